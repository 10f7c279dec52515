"""LitServe with batching and its fast queue. It takes no raw body; a form costs more than base64 in JSON."""

import base64
import sys

import litserve
from model import MAX_BATCH, Model


class Api(litserve.LitAPI):
    """Its five verbs."""

    def setup(self, device: str) -> None:
        """Open the model in the worker."""
        self.model = Model(*sys.argv[1:3])

    def decode_request(self, request: dict):
        """One image."""
        return self.model.decode(base64.b64decode(request["image"]))

    def batch(self, inputs):
        """Its own would stack; ours stacks in `answer`."""
        return inputs

    def predict(self, inputs):
        """A batch."""
        return self.model.answer(inputs)

    def unbatch(self, output):
        """They are a list already."""
        return output

    def encode_response(self, output):
        """One answer."""
        return {"probabilities": output}


if __name__ == "__main__":
    api = Api(max_batch_size=MAX_BATCH, batch_timeout=0.002)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=True, timeout=60)
    server.run(host="127.0.0.1", port=int(sys.argv[3]), log_level="warning", access_log=False,
               generate_client_file=False)  # fmt: skip
