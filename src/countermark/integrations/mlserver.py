"""A guarded model as a runtime of MLServer (`pip install 'countermark[serve]' mlserver`).

The model's `model-settings.json` names the runtime, and its settings as `parameters`:

    {"name": "mine", "implementation": "countermark.integrations.mlserver.GuardedRuntime",
     "parameters": {"uri": "mine", "extra": {"log": "log.db", "client_header": "x-client"}}}

`uri` is the model folder, and `extra` holds options of `countermark.Guarded`. `client_header` is
the header in which whatever stands in front of MLServer says who asks, after it made sure of that.
It must let nobody else set that header. With several `parallel_workers` each process writes to
the one log. MLServer's own batching is refused, because it mixes clients.
"""

from collections.abc import Sequence

import numpy as np
from mlserver import MLModel
from mlserver.codecs import Base64Codec, NumpyCodec, StringCodec
from mlserver.errors import InferenceError, MLServerError
from mlserver.types import InferenceRequest, InferenceResponse, RequestInput

from countermark.data.images import DamagedError
from countermark.errors import CountermarkError
from countermark.service.engine import BusyError
from countermark.service.guarded import Guarded, Image


class GuardedRuntime(MLModel):  # type: ignore[misc]  # MLServer is not there when types are checked
    """Answers with labels and names of classes.

    The one input is a tensor of images `[n, c, h, w]`, UINT8 or floating-point of [0, 1], or BYTES,
    each the base64 of an image file. The outputs are `label` (INT64) and `class` (BYTES).
    """

    async def load(self) -> bool:
        """Load the model folder with its guard, and open the log.

        Raises:
            CountermarkError: a setting is missing or asks for batches, or as for `Guarded`.
        """
        parameters = self.settings.parameters
        options = dict(parameters.extra or {}) if parameters else {}
        header = options.pop("client_header", None)
        if not (parameters and parameters.uri and isinstance(header, str) and "log" in options):
            raise CountermarkError(
                "model-settings.json needs parameters with uri (the model folder) and, in extra, "
                "log and client_header"
            )
        if self.settings.max_batch_size > 1 and self.settings.max_batch_time > 0:
            raise CountermarkError(
                "MLServer's batching gives the images of several clients one client's headers; "
                "leave max_batch_size and max_batch_time out, because the guard makes batches "
                "itself"
            )
        self._header = header.lower()
        try:
            self._guard = Guarded(parameters.uri, **options)
        except TypeError as error:  # a name that is no option
            raise CountermarkError(f"extra in model-settings.json: {error}") from error
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Answer one request."""
        headers = (payload.parameters.headers if payload.parameters else None) or {}
        client = {name.lower(): value for name, value in headers.items()}.get(self._header)
        if not client:
            raise MLServerError(f"the header {self._header} does not say who asks", 401)
        if len(payload.inputs) != 1:
            raise InferenceError("inputs is a list of one tensor")
        try:
            found = await self._guard.classify(_images(payload.inputs[0]), client)
        except DamagedError as error:
            raise InferenceError(str(error)) from error
        except BusyError as error:
            raise MLServerError(str(error), 503) from error
        except CountermarkError as error:  # the engine says on standard error why
            raise MLServerError("the query could not be answered; try again later", 500) from error
        return InferenceResponse(
            model_name=self.name,
            model_version=self.version,
            outputs=[
                NumpyCodec.encode_output(
                    "label", np.array([each.label for each in found], np.int64)
                ),
                StringCodec.encode_output("class", [each.name for each in found]),
            ],
        )

    async def unload(self) -> bool:
        """Answer what waits, and close the log."""
        self._guard.close()
        return True


def _images(tensor: RequestInput) -> Sequence[Image]:
    try:
        if tensor.datatype == "BYTES":
            return list(Base64Codec.decode_input(tensor))
        return list(NumpyCodec.decode_input(tensor))
    except (ValueError, TypeError, KeyError) as error:
        raise InferenceError(f"the tensor cannot be read: {error}") from error
