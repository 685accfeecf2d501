"""Train a small LLaMA with AdamW, APOLLO and APOLLO-Mini and compare them."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None: ...
def run(options: argparse.Namespace) -> int:
    return 0
