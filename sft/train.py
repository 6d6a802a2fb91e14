"""One run, top to bottom."""

from sft.cli import Command
from sft.config import Config, fill_names
from sft.checks import check


def train(config):
    print(config)


main = Command("train", Config, train, check, "fine-tune a model", ("x",), "train")
if __name__ == "__main__":
    main()
