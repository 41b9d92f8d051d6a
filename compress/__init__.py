"""Teachers in, student checkpoint out."""

import logging

# Where a processor multiplies bfloat16, bitsandbytes advises a kernel from a hub at every import; nothing here needs it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
