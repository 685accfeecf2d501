"""A LightningModule that may be handed a function which makes its optimizer. LightningCLI reads the types of this file;
``framework_programs.py`` imports it where lightning is installed."""

from framework_programs import MORE, STEPS, Model, loss_of
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader


class Module(LightningModule):
    def __init__(self, optimizer: OptimizerCallable | None = None) -> None:
        super().__init__()
        self.model, self.optimizer, self.losses = Model(), optimizer, list[float]()

    def training_step(self, batch: Tensor) -> Tensor:
        loss = loss_of(self.model)
        self.losses.append(loss.item())
        return loss

    def train_dataloader(self) -> DataLoader:
        return DataLoader(range(STEPS + MORE))

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer(self.model.named_parameters())
