"""What type checkers read of the names that load on first use; a test keeps them in step."""

from relubook.book import setup as setup
from relubook.book import show as show
from relubook.evidence.claims import claim as claim
from relubook.evidence.claims import part as part
from relubook.layers import activations as activations
from relubook.layers import initializers as initializers
from relubook.layers.maxout import Maxout as Maxout
from relubook.training.recipe import Recipe as Recipe
from relubook.training.train import train as train
from relubook.units.certificate import certify_dead as certify_dead
from relubook.units.diagnosis import diagnose as diagnose
from relubook.units.revival import revive_ as revive_
from relubook.units.reviver import Reviver as Reviver
from relubook.units.risk import off_center as off_center
from relubook.units.watch import Watch as Watch

__all__: list[str]
__version__: str
