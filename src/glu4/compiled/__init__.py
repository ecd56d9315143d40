"""Ahead-of-time compilation of device code, the cache of what was compiled, and the loader, which needs neither CuTe DSL nor
a compiler."""
