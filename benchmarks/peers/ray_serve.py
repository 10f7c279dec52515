"""Ray Serve with its batching, and the settings that its documentation names for throughput.

The clients ask the replica itself (direct ingress): several times faster than asking Ray's proxy.
Ray's own ports listen on every address whatever is set, so they ask for a token.
"""

import os
import secrets
import sys
import threading

PORT = int(sys.argv[3]) if __name__ == "__main__" else 0
os.environ |= {  # read when ray is imported, here and in its processes
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(PORT),
    "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(PORT + 1),
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}

import ray  # noqa: E402
from model import MAX_BATCH, Model  # noqa: E402
from ray import serve  # noqa: E402

from services.stack import free_port  # noqa: E402


@serve.deployment(num_replicas=1, max_ongoing_requests=100, ray_actor_options={"num_cpus": 1})
class Peer:
    """One replica."""

    def __init__(self, package: str, engine: str) -> None:
        self.model = Model(package, engine)

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0.0)
    async def answer(self, images):
        """What waits, at once."""
        return self.model.answer(images)

    async def __call__(self, request):
        """A raw body."""
        return {"probabilities": await self.answer(self.model.decode(await request.body()))}


if __name__ == "__main__":
    package, engine, _, folder = sys.argv[1:5]
    ray.init(include_dashboard=False, num_cpus=2, log_to_driver=False, _temp_dir=folder,
             object_store_memory=100 * 2**20)  # fmt: skip
    serve.start(http_options={"host": "127.0.0.1", "port": free_port()})
    serve.run(Peer.bind(package, engine), route_prefix="/predict")
    threading.Event().wait()
