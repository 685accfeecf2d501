"""Count the bytes of weights, gradients and optimizer state."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None: ...
def run(options: argparse.Namespace) -> int:
    return 0
