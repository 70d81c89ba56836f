"""Write a run as one file that needs no blemish: python tools/export.py run=results/runs/… format=onnx|torch_export|openvino"""

import hydra
from omegaconf import DictConfig

from blemish.cli import export


@hydra.main(config_path="../configs", config_name="export", version_base="1.3")
def main(cfg: DictConfig) -> None:
    export(cfg)


if __name__ == "__main__":
    main()
