"""Chat completions with demonstrations, by the handlers of `transformers serve`."""

from __future__ import annotations

import asyncio
import copy
import json
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import wait
from typing import TYPE_CHECKING, Any

import torch
from fastapi.responses import JSONResponse, StreamingResponse
from openai.types.completion_usage import CompletionUsage, PromptTokensDetails
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState, Modality, set_torch_seed

from .demonstrations import Prompt, PromptBuilder
from .metrics import Metrics
from .requests import Refused, ServingLimits, checked_request

if TYPE_CHECKING:
    from .. import AimForConditionalGeneration, AimProcessor

STOP_SECONDS = 10  # for the step of generation that is running when the server stops


class ClientGone(Exception):
    """The client of a request hung up before its turn came."""


class Cancelled(StoppingCriteria):
    """Stops generation when the client has hung up."""

    def __init__(self, gone: threading.Event) -> None:
        self.gone = gone

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.gone.is_set(), device=input_ids.device, dtype=torch.bool)


class OneModel(ModelManager):
    """The one model of a server, which is loaded before it starts.

    Args:
        name: what clients call it.
        model: the plug-in, with its processor.
        wait: returns when no work is left on the model.
    """

    def __init__(self, name: str, model: AimForConditionalGeneration, wait: Callable[[], None]) -> None:
        super().__init__()
        self.force_model, self._model, self._wait = name, model, wait

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """The name as it is, without a revision."""
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
        """The model and its processor; nothing else is ever loaded."""
        if model_id_and_revision != self.force_model:
            wanted = f"{model_id_and_revision!r:.100}"
            raise Refused(f"The model {wanted} is not served here; this server has {self.force_model!r}.", 404)
        return self._model, self._model.processor

    async def load_model_streaming(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> AsyncIterator[str]:
        """What `transformers chat` asks before it starts."""
        served = model_id_and_revision == self.force_model
        answer = {"status": "ready", "cached": True} if served else {"status": "error", "message": "It is not served."}
        yield f"data: {json.dumps(answer)}\n\n"

    @staticmethod
    def get_model_modality(model: AimForConditionalGeneration, processor: AimProcessor | None = None) -> Modality:
        """Images and text."""
        return Modality.VLM

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
        """The one model, as `/v1/models` lists it."""
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "aim"}]

    def shutdown(self) -> None:
        """Wait until the model rests."""
        self._wait()


class OneThread(GenerateManager):
    """Work on the model, one request after another; that of a client who has hung up is not started, or stops."""

    async def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """What `work` returns, on the thread of the model."""
        return await self._unless_gone(lambda gone: work(*arguments))

    async def generate_non_streaming(
        self,
        model: AimForConditionalGeneration,
        processor: AimProcessor,
        inputs: dict[str, Any],
        gen_config: GenerationConfig,
        request_id: str,
    ) -> tuple[str, int, torch.Tensor]:
        """Text, number of tokens of the query, and new tokens."""

        def work(gone: threading.Event) -> torch.Tensor:
            criteria = StoppingCriteriaList([Cancelled(gone)])
            return model.generate(
                **inputs, generation_config=gen_config, tokenizer=processor, stopping_criteria=criteria
            )

        length = inputs["input_ids"].shape[-1]
        new = (await self._unless_gone(work))[0, length:]
        return processor.decode(new, skip_special_tokens=True), length, new

    async def _unless_gone(self, work: Callable[[threading.Event], Any]) -> Any:
        gone = threading.Event()

        def started() -> Any:
            if gone.is_set():
                raise ClientGone
            return work(gone)

        waiting = asyncio.wrap_future(self.submit(started))
        waiting.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to ask
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            gone.set()
            raise

    def wait(self) -> None:
        """Return when everything that was submitted is done, `STOP_SECONDS` from now at the latest."""
        wait([self.submit(lambda: None)], timeout=STOP_SECONDS)


class OneThreadState(GenerationState):
    """Gives every handler the one thread."""

    def __init__(self, manager: OneThread) -> None:
        super().__init__()
        self._manager = manager

    def get_manager(self, model_id: str, use_cb: bool = False) -> OneThread:
        """The thread of the model."""
        return self._manager


class AimChatHandler(ChatCompletionHandler):
    """`/v1/chat/completions`: earlier turns and banks become demonstrations, and usage counts them.

    Args:
        builder: makes prompts.
        limits: what is taken from clients.
        metrics: counts tokens and demonstrations.
        **handlers: as for the handler of transformers.
    """

    def __init__(self, builder: PromptBuilder, limits: ServingLimits, metrics: Metrics, **handlers: Any) -> None:
        super().__init__(**handlers)
        self.builder, self.limits, self.metrics = builder, limits, metrics
        self.prompt: Prompt | None = None

    async def handle_request(self, body: dict[str, Any], request_id: str) -> StreamingResponse | JSONResponse:
        """Check a request, make its prompt on the thread of the model, and answer."""
        request = checked_request(body, self.limits, tuple(self.builder.banks))
        model_id, model, processor = self._resolve_model({"model": body.get("model")})
        manager: Any = self.generation_state.get_manager(model_id)
        answering = copy.copy(self)  # of this request alone: usage is that of its prompt
        answering.prompt = await manager.run(self.builder.build, request)
        self.metrics.note(answering.prompt)
        config = self._configured(request.generation, model.generation_config, self.builder.room(answering.prompt))
        if request.seed is not None:
            manager.submit(set_torch_seed, request.seed)  # nothing comes between this and generation
        arguments = (request_id, model, processor.tokenizer, model_id, answering.prompt.inputs, config)
        if request.stream:
            return answering._streaming(*arguments, gen_manager=manager)
        return await answering._non_streaming(*arguments, gen_manager=manager)

    def _configured(self, request: dict[str, Any], own: GenerationConfig, room: int | None) -> GenerationConfig:
        """The model's own generation settings with those that a request asks for."""
        config = copy.deepcopy(own)
        temperature, sample = request["temperature"], request["do_sample"]
        if temperature is not None:
            config.do_sample = temperature > 0
            config.temperature = float(temperature) or 1.0
        if sample is not None:
            config.do_sample = bool(sample) and temperature != 0
        if request["top_p"] is not None:
            config.top_p = float(request["top_p"])
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = None
        if request["stop_strings"] is not None:
            config.stop_strings = request["stop_strings"]
        most = request["max_new_tokens"] or config.max_new_tokens or self.limits.max_new_tokens
        config.max_new_tokens = min(most, self.limits.max_new_tokens, most if room is None else room)
        config.max_length = None
        return config

    def _resolve_model(self, body: dict[str, Any]) -> Any:
        """Name, model and processor; a model of another name is refused."""
        name = str(self.model_manager.force_model)
        wanted = name if body["model"] is None else body["model"]
        return name, *self.model_manager.load_model_and_processor(wanted)

    # --- usage

    def _build_completion(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return super()._build_completion(*args, **{**kwargs, "usage": self._with_fused(kwargs.get("usage"))})

    def _build_chunk_sse(self, *args: Any, **kwargs: Any) -> str:
        return super()._build_chunk_sse(*args, **{**kwargs, "usage": self._with_fused(kwargs.get("usage"))})

    def _with_fused(self, usage: CompletionUsage | None) -> CompletionUsage | None:
        """Usage with fused tokens, and what they save."""
        if usage is None or self.prompt is None:
            return usage
        self.metrics.answered(usage.completion_tokens)
        prompt = self.prompt
        saved = {} if prompt.saved is None else {"saved_tokens": prompt.saved}
        counts = {"demonstrations": prompt.demonstrations, "read": prompt.read, "fused_tokens": prompt.fused, **saved}
        return CompletionUsage.model_validate(
            {
                "prompt_tokens": prompt.tokens,
                "completion_tokens": usage.completion_tokens,
                "total_tokens": prompt.tokens + usage.completion_tokens,
                "prompt_tokens_details": PromptTokensDetails(cached_tokens=prompt.cached),
                "aim": counts,
            }
        )
