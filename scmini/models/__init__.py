"""Models: loading, attention over prefix trees, samplers, encoders, reward models."""

import logging

# bitsandbytes tells at import that an optional CPU kernel could not be downloaded; nobody asked.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
