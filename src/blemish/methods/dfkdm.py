"""DFKDM: a density model of deep features, a kernel density or one Gaussian, for folders of whole scenes."""

from blemish.detector import Stages
from blemish.methods.dfkde import DFKDE


class DFKDM(DFKDE):
    """Anomaly = −log density of the image's feature on its principal components, by `density`: kde as in DFKDE, or gaussian."""

    def __init__(self, backbone: str, stages: Stages, weights: str, components: int, density: str, bandwidth: str | float, seed: int):
        super().__init__(backbone, stages, weights, components, bandwidth, seed)
        self.save_hyperparameters()
        self.check_arguments(density=("kde", "gaussian"))
        self.density = density
