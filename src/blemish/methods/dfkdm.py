"""DFKDM: a density model of deep features, a kernel density or one Gaussian, for folders of whole scenes."""

from blemish.detector import Stages
from blemish.methods.dfkde import DFKDE


class DFKDM(DFKDE):
    """Anomaly = −log density of the image's feature on its principal components, by `density`: kde as in DFKDE, gaussian, or auto.

    auto takes the one under which the training images, each left out of the fit once, are likelier.
    """

    def __init__(
        self,
        backbone: str,
        stages: Stages,
        weights: str,
        components: int,
        density: str,
        bandwidth: str | float,
        scaling: str,
        seed: int,
    ):
        super().__init__(backbone, stages, weights, components, bandwidth, scaling, seed)
        self.save_hyperparameters()
        self.check_arguments(density=("kde", "gaussian", "auto"))
        self.density = density
