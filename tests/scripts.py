"""The scripts that are written after the same design, for tests that run over all of them."""

import msf

METHODS = [msf]
