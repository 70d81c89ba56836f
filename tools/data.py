"""Look at a data set, or make one to choose settings on: python tools/data.py check|synthesize data=mvtec data.root=<folder> [output=…].

check: what is there and what is broken, and the split as a CSV. synthesize: a folder of its training images, a share of them with drawn
defects, for data=folder data.normal_test=normal_test data.abnormal=[defects] data.masks=masks.
"""

import sys

import hydra
from omegaconf.errors import OmegaConfBaseException

from blemish.data import check, synthetic
from blemish.types import InputError


@hydra.main(config_path="../configs", config_name="data", version_base="1.3")
def main(cfg) -> None:
    try:
        data = hydra.utils.instantiate(cfg.data, _convert_="all")
        if cfg.action == "check":
            sys.exit(check.report(data, cfg.output or "manifest.csv"))
        data.setup()
        print(f"{synthetic.write(data, cfg.output or 'synthetic', cfg.share, cfg.seed)} images drawn on: {cfg.output or 'synthetic'}")
    except (InputError, hydra.errors.InstantiationException, OmegaConfBaseException) as error:
        print(error.__cause__ if isinstance(error.__cause__, InputError) else error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    if sys.argv[1:2] not in (["check"], ["synthesize"]):
        sys.exit(f"{__doc__}\nActions: check, synthesize")
    sys.argv[1] = f"action={sys.argv[1]}"
    main()
