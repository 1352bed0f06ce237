"""Eight virtual CPU devices for every test; read by JAX when it first runs something."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
).strip()
# Virtual devices wait for one another in threads of one pool, as large as the number of
# cores or devices unless told otherwise. It must not run out, or a collective hangs.
os.environ.setdefault("PJRT_NPROC", "32")
