"""How the toy backbones of the mini scale were made: no part of the package, no run needs it."""
