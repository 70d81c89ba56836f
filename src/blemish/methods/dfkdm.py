"""DFKDM: a density model of deep features, a kernel density or one Gaussian, for folders of whole scenes."""

from collections.abc import Sequence

from blemish.detector import Maps
from blemish.edge.checks import check_choice
from blemish.methods.dfkde import DFKDE
from blemish.ops import pca
from blemish.types import Prediction


class DFKDM(DFKDE):
    """Anomaly = −log density of the image's feature on its principal components, `density`: kde as in DFKDE, or gaussian.

    The multivariate Gaussian has the training features' mean and covariance, which is diagonal on their principal components.
    """

    def __init__(
        self, backbone: str, stages: Sequence[int | str], weights: str, components: int, density: str, bandwidth: str | float, seed: int
    ):
        check_choice("model", ("kde", "gaussian"), density=density)
        super().__init__(backbone, stages, weights, components, bandwidth, seed)
        self.save_hyperparameters()
        self.density = density

    def score(self, maps: Maps, size: tuple[int, int]) -> Prediction:
        if self.density == "kde":
            return super().score(maps, size)
        return Prediction(pca.negative_log_likelihood(self.space, self.embed(maps)).float())
