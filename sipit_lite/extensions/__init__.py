"""What goes beyond the paper; with it ``invert`` has a lens where none is given."""

from importlib import import_module

from sipit_lite import sipit
from sipit_lite.sipit import invert, invert_many

__all__ = ["invert", "invert_many"]
# Imported where it is wanted, like all rooms.
name = "sipit_lite.extensions.fitted"
sipit.offer = lambda *where: import_module(name).offered(*where)
