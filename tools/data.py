"""Look at a data set before training on it: python tools/data.py check data=mvtec data.root=<folder> [output=manifest.csv]."""

import sys

import hydra
from omegaconf.errors import OmegaConfBaseException

from blemish.data.check import report
from blemish.types import InputError


@hydra.main(config_path="../configs", config_name="data", version_base="1.3")
def main(cfg) -> None:
    try:
        sys.exit(report(hydra.utils.instantiate(cfg.data, _convert_="all"), cfg.output))
    except (InputError, hydra.errors.InstantiationException, OmegaConfBaseException) as error:
        print(error.__cause__ if isinstance(error.__cause__, InputError) else error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    if sys.argv[1:2] != ["check"]:
        sys.exit(f"{__doc__}\nActions: check")
    sys.argv.pop(1)
    main()
