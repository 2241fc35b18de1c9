"""A run's directory kept a second time, in an object store or on another disk, so that a run outlives its machine.

The mirror is itself a run directory, under the same names: whole files are copied, what names others after them, and
deletions come last (`contents`), so that what is there is a run that goes on at whatever moment copying stops. `copying`
brings a run there, `keeping` does so while it goes on, `arriving` brings it back, `place` is the store, `claim` says whose
mirror it is.
"""

from npd.mirror.arriving import arrive, bring_down, mirror_plan
from npd.mirror.keeping import Mirror
from npd.mirror.place import Place

__all__ = ["Mirror", "Place", "arrive", "bring_down", "mirror_plan"]
