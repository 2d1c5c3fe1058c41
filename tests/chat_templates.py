"""Chat templates in the formats of many model families, each with a small tokenizer that has the family's tokens."""

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

TEXTS = ["Hello, how are you today?", "What is 2 plus 3?", "The answer is five.\n\nAnything else?", "Be brief. <b> [x]"]
GUARD = "{% if not messages %}{{ raise_exception('no messages') }}{% endif %}"

# name: (tokens that the format writes, end of a turn, beginning of a text, template)
FORMATS: dict[str, tuple[list[str], str, str | None, str]] = {
    "chatml": (
        ["<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
        None,
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
    "default system": (
        ["<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
        None,
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ),
    "headers": (
        ["<|begin|>", "<|start_header|>", "<|end_header|>", "<|eot|>"],
        "<|eot|>",
        "<|begin|>",
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header|>' + m.role + '<|end_header|>\n\n' + m.content | trim"
        " + '<|eot|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header|>assistant<|end_header|>\n\n' }}{% endif %}",
    ),
    "inst": (
        ["<s>", "</s>", "[INST]", "[/INST]"],
        "</s>",
        "<s>",
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}"
        "{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}",
    ),
    "inst text": (
        ["<s>", "</s>"],
        "</s>",
        "<s>",
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
    ),
    "turns": (
        ["<bos>", "<start_of_turn>", "<end_of_turn>"],
        "<end_of_turn>",
        "<bos>",
        "{{ bos_token }}{% for m in messages if m.role != 'system' %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim "
        "+ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    ),
    "roles": (
        ["<|system|>", "<|user|>", "<|assistant|>", "</s>"],
        "</s>",
        None,
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    ),
    "roles and end": (
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        "<|end|>",
        None,
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    ),
    "instructions": (
        ["</s>"],
        "</s>",
        None,
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '### Response:\n' + m.content + eos_token + '\n\n' }}"
        "{% else %}{{ '### Instruction:\n' + m.content + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
    ),
    "names": (
        ["<s>", "</s>"],
        "</s>",
        "<s>",
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
        "{% elif m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% else %}{{ m.content + ' ' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    ),
    "thoughts": (
        ["<|im_start|>", "<|im_end|>", "+<think>", "+</think>"],
        "<|im_end|>",
        None,
        "{% for m in messages %}{% set text = m.content %}"
        "{% if m.role == 'assistant' and '</think>' in text and not loop.last %}"
        "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{% endif %}",
    ),
    "tools": (
        ["<|im_start|>", "<|im_end|>", "+<tool_call>", "+</tool_call>"],
        "<|im_end|>",
        None,
        "{% for m in messages %}{{ '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\n' + m.content }}"
        "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}"
        "{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
    "turn tokens": (
        ["<BOS>", "<|START|>", "<|END|>", "<|USER|>", "<|CHATBOT|>", "<|SYSTEM|>"],
        "<|END|>",
        "<BOS>",
        "{{ bos_token }}{% for m in messages %}{{ '<|START|>' + {'user': '<|USER|>', 'assistant': '<|CHATBOT|>', "
        "'system': '<|SYSTEM|>'}[m.role] + m.content | trim + '<|END|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|START|><|CHATBOT|>' }}{% endif %}",
    ),
    "single tokens": (
        ["<|user|>", "<|bot|>", "</s>"],
        "</s>",
        None,
        "{% for m in messages %}{{ {'user': '<|user|>', 'assistant': '<|bot|>', 'system': ''}[m.role] + m.content "
        "+ ('</s>' if m.role == 'assistant' else '') }}{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}",
    ),
}


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """The small tokenizer of a format: byte-level, or with Metaspace for the formats with <s>."""
    tokens, end, begin, template = FORMATS[name]
    backend = Tokenizer(BPE(unk_token="<unk>"))
    if begin == "<s>":
        backend.normalizer = normalizers.Replace(" ", "▁")  # pyright: ignore[reportAttributeAccessIssue]
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # pyright: ignore[reportAttributeAccessIssue]
        backend.decoder = decoders.Metaspace(prepend_scheme="first")  # pyright: ignore[reportAttributeAccessIssue]
        alphabet = [chr(i) for i in range(32, 127)]
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
        backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [token for token in tokens if not token.startswith("+")]
    trainer = BpeTrainer(vocab_size=500, special_tokens=["<pad>", "<unk>", *special], initial_alphabet=alphabet)
    backend.train_from_iterator([*TEXTS, "assistant user system model ASSISTANT USER Instruction Response\n"], trainer)
    backend.add_tokens([AddedToken(token[1:], normalized=False) for token in tokens if token.startswith("+")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token=end,
        bos_token=begin,
        additional_special_tokens=special,
        chat_template=GUARD + template,
    )
