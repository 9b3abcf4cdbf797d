"""Statistics: what criteria need to know of the data. Each rank looks at batches of its own; owners get the sums."""

from hpcprune.statistics.attention import Attention
from hpcprune.statistics.calibration import Calibration
from hpcprune.statistics.gradients import Gradients
from hpcprune.statistics.inputs import InputEnergy
from hpcprune.statistics.statistic import Gathered, Statistic

__all__ = ["Attention", "Calibration", "Gathered", "Gradients", "InputEnergy", "Statistic"]
