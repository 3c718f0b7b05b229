"""What LiteLLM (1.106) leaves open and its settings cannot close. Mounted beside its config file, see compose.yaml."""

from litellm.integrations.custom_guardrail import CustomGuardrail
from litellm.proxy.guardrails.guardrail_hooks.generic_guardrail_api import GenericGuardrailAPI

# A streamed response is held back until it has been judged; otherwise its words are out before the verdict.
GenericGuardrailAPI.streaming_buffer_until_moderated = True


class PicturesAlone(CustomGuardrail):
    """Gives every message of parts a text: LiteLLM calls no guardrail for a request without one."""

    async def async_pre_call_hook(self, user_api_key_dict, cache, data, call_type):
        for message in data.get("messages") or []:
            content = message.get("content")
            if isinstance(content, list):  # also one with a text: what counts as one there may be null
                content.append({"type": "text", "text": " "})
        return data
