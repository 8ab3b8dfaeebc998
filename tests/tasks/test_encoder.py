import copy

import pytest
import torch
from accelerate import PartialState
from torch.nn.functional import normalize
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from lohp_peft.adapters.layout import AdapterLayout
from lohp_peft.adapters.space import CoreSpace, LoraBSpace
from lohp_peft.tasks import EncodedTexts, TextEncoder, tokenizer_fingerprint
from lohp_peft.tasks.requirements import check_length
from tiny import WORDS, build_base_model, build_encoder, build_tokenizer


def whole_model(encoder, state, text, text_b=None, pooling="mean"):
    """The embedding of one text, by the model with the update merged into its weights."""
    model = copy.deepcopy(encoder.base_model)
    if state is not None:
        for name, delta in encoder.space.delta_weight(state).items():
            weight = model.get_submodule(name).weight
            weight.data += delta if isinstance(model.get_submodule(name), torch.nn.Linear) else delta.T
    batch = encoder.tokenizer(text, text_b, truncation=True, max_length=encoder.max_length, return_tensors="pt")
    with torch.no_grad():
        tokens = model(**batch).last_hidden_state[0]
    return {"mean": tokens.mean(0), "first": tokens[0], "last": tokens[-1]}[pooling]


def decoder(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        model = GPT2Model(GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=3, n_head=2, n_positions=128))
        targets = ["c_attn"]
    else:
        config = LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=16,
        )
        model, targets = LlamaModel(config), ["q_proj", "v_proj"]
    return model.eval(), targets


def random_states(space, count):
    return torch.randn(count, *space.shape) * space.mask


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_equals_the_whole_model_text_by_text(texts, pooling, pair):
    encoder = build_encoder(pooling=pooling, batch_size=4)
    texts_b = texts.texts[::-1] if pair else None
    states, owner = random_states(encoder.space, 3), torch.arange(len(texts)) % 3
    encoded = encoder.prepare(texts.texts, texts_b)
    assert encoder.first_layer == 2
    base, adapted = encoder.embed(encoded), encoder.embed(encoded, states, owner)
    for i, text in enumerate(texts.texts):
        other = texts_b[i] if pair else None
        torch.testing.assert_close(base[i], whole_model(encoder, None, text, other, pooling), atol=1e-5, rtol=1e-4)
        one = whole_model(encoder, states[owner[i]], text, other, pooling)
        torch.testing.assert_close(adapted[i], one, atol=1e-5, rtol=1e-4)
    assert (adapted - base).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("space_kind", ["core", "lora_b"])
def test_decoders_and_right_padding_for_left_padding_tokenizers(texts, kind, space_kind):
    model, targets = decoder(kind)
    layout = AdapterLayout.from_model(model, targets, [1, 2])
    space = CoreSpace.from_base_weights(model, layout, 2) if space_kind == "core" else LoraBSpace.seeded(layout, 2)
    tokenizer = build_tokenizer()
    tokenizer.model_input_names, tokenizer.padding_side = ["input_ids", "attention_mask"], "left"
    encoder = TextEncoder(model, tokenizer, space, pooling="last", batch_size=5)
    states, owner = random_states(space, 2), torch.arange(len(texts)) % 2
    encoded = encoder.prepare(texts.texts)
    assert encoder.first_layer == 1
    assert (encoded.attention_mask[:, 0] == 1).all()
    adapted = encoder.embed(encoded, states, owner)
    for i, text in enumerate(texts.texts):
        one = whole_model(encoder, states[owner[i]], text, pooling="last")
        torch.testing.assert_close(adapted[i], one, atol=1e-5, rtol=1e-4)
    assert tokenizer.padding_side == "left"


def test_the_prefix_changes_nothing(encoder, texts):
    whole = copy.copy(encoder)
    whole.first_layer = 0
    states, owner = random_states(encoder.space, 2), torch.arange(len(texts)) % 2
    mine, theirs = encoder.prepare(texts.texts), whole.prepare(texts.texts)
    assert not mine.hidden.equal(theirs.hidden)
    expected = whole.embed(theirs, states, owner)
    torch.testing.assert_close(encoder.embed(mine, states, owner), expected, atol=1e-5, rtol=1e-4)


def test_padding_to_a_longer_neighbour_changes_nothing(encoder, texts):
    encoded = encoder.prepare(texts.texts)
    alone = torch.cat([encoder.embed(encoder.prepare([text])) for text in texts.texts])
    torch.testing.assert_close(encoder.embed(encoded), alone, atol=1e-5, rtol=1e-4)


def test_rows_can_be_picked_and_joined(encoder, texts):
    encoded = encoder.prepare(texts.texts)
    whole = encoder.embed(encoded)
    order = torch.randperm(len(texts))
    torch.testing.assert_close(encoder.embed(encoded[order]), whole[order], atol=1e-5, rtol=1e-4)
    parts = EncodedTexts.concatenate([encoded[order[:5]], encoded[order[5:]]])
    torch.testing.assert_close(encoder.embed(parts), whole[order], atol=1e-5, rtol=1e-4)
    short = encoded.attention_mask.sum(1).argmin()
    assert encoded[short[None]].hidden.shape[1] == encoded.attention_mask[short].sum()


def test_gradients_reach_the_states_only(encoder, texts):
    states = random_states(encoder.space, 1).requires_grad_()
    encoder.embed(encoder.prepare(texts.texts), states).square().sum().backward()
    assert (states.grad.abs() > 0).any(-1).all()
    assert all(p.grad is None for p in encoder.base_model.parameters())


def test_several_adapters_need_owners(encoder, texts):
    with pytest.raises(ValueError, match="`owner` must name the adapter"):
        encoder.embed(encoder.prepare(texts.texts), random_states(encoder.space, 2))


def test_statistics_are_means_over_tokens_in_the_bases(encoder, texts):
    encoded = encoder.prepare(texts.texts)
    state = random_states(encoder.space, 1)[0]
    for at in (None, state):
        found = encoder.statistics(encoded, at)
        assert found.modules.shape == (len(texts), len(encoder.space.layout.modules), 4)
        torch.testing.assert_close(found.embeddings, encoder.embed(encoded, None if at is None else at[None]))
        seen = {}
        model = copy.deepcopy(encoder.base_model)
        for i, spec in enumerate(encoder.space.layout.modules):
            module = model.get_submodule(spec.name)
            if at is not None:
                module.weight.data += encoder.space.delta_weight(at)[spec.name]

            def keep(_module, args, output, i=i, seen=seen):
                sides = args[0][0] @ encoder.space.input_basis(i), output[0] @ encoder.space.output_basis(i)
                seen[i] = torch.cat(sides, -1).mean(0)

            module.register_forward_hook(keep)
        for n in (0, 7, 13):
            with torch.no_grad():
                model(**encoder.tokenizer(texts.texts[n], return_tensors="pt"))
            torch.testing.assert_close(found.modules[n], torch.stack([seen[0], seen[1]]), atol=1e-5, rtol=1e-4)


def test_the_model_is_left_as_it_was(encoder, texts):
    model = encoder.base_model
    model.train()
    model.encoder.layer[0].eval()
    model.encoder.layer[1].forward = forward = model.encoder.layer[1].forward  # as accelerate's hooks do
    before = {name: (module.training, dict(vars(module))) for name, module in model.named_modules()}
    encoded = encoder.prepare(texts.texts)
    encoder.embed(encoded, random_states(encoder.space, 1))
    encoder.statistics(encoded)
    for name, module in model.named_modules():
        assert module.training == before[name][0], name
        assert vars(module).keys() == before[name][1].keys(), name
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
    assert model.encoder.layer[1].forward is forward
    del model.encoder.layer[1].forward
    model.eval()


@pytest.mark.parametrize("stage", ["prepare", "embed", "statistics"])
def test_the_model_is_left_as_it_was_after_an_error(encoder, texts, stage):
    encoded, model = encoder.prepare(texts.texts), encoder.base_model
    expected = encoder.embed(encoded)

    def fail(*_):
        raise KeyboardInterrupt

    broken = model.embeddings if stage == "prepare" else model.encoder.layer[2].output
    handle = broken.register_forward_hook(fail)
    run = {
        "prepare": lambda: encoder.prepare(texts.texts),
        "embed": lambda: encoder.embed(encoded, random_states(encoder.space, 1)),
        "statistics": lambda: encoder.statistics(encoded),
    }[stage]
    with pytest.raises(KeyboardInterrupt):
        run()
    handle.remove()
    for name, module in model.named_modules():
        assert "forward" not in vars(module), name
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
    assert encoder.embed(encoded).equal(expected)


def test_a_peft_model_is_read_through(encoder, texts):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(copy.deepcopy(encoder.base_model), LoraConfig(target_modules=["query", "value"]))
    other = TextEncoder(wrapped, encoder.tokenizer, encoder.space, batch_size=4)
    state = random_states(encoder.space, 1)
    expected = encoder.embed(encoder.prepare(texts.texts), state)
    torch.testing.assert_close(other.embed(other.prepare(texts.texts), state), expected, atol=1e-5, rtol=1e-4)
    assert other.statistics(other.prepare(texts.texts)).modules.shape[1] == 2


def test_long_texts_are_truncated(encoder):
    short = TextEncoder(encoder.base_model, encoder.tokenizer, encoder.space, max_length=6)
    encoded = short.prepare(["word1 " * 20, "word1 " * 4])
    assert encoded.attention_mask.shape == (2, 6)
    torch.testing.assert_close(*short.embed(encoded), atol=1e-6, rtol=1e-5)


def test_bfloat16_bank_states_and_autocast_stay_close(encoder, texts):
    exact = encoder.embed(encoder.prepare(texts.texts))
    half = TextEncoder(encoder.base_model, encoder.tokenizer, encoder.space, dtype=torch.bfloat16)
    close = half.embed(half.prepare(texts.texts).to(torch.bfloat16))
    assert normalize(close.float(), dim=1).mul(normalize(exact, dim=1)).sum(1).min() > 0.995
    assert not close.equal(exact)


def test_errors(encoder):
    with pytest.raises(ValueError, match=r"must be one of \['mean', 'first', 'last'\], got 'max'"):
        TextEncoder(encoder.base_model, encoder.tokenizer, encoder.space, pooling="max")
    with pytest.raises(ValueError, match="at least one text, got none"):
        encoder.prepare([])
    with pytest.raises(ValueError, match="encoder.layer.2.attention.self.query: layout .16, 16., model absent"):
        TextEncoder(build_base_model(2), encoder.tokenizer, encoder.space)
    encoded = encoder.prepare(["word1"])
    with pytest.raises(ValueError, match="`prepare` them with it"):
        encoder.embed(EncodedTexts(None, encoded.attention_mask, encoded.token_ids, encoded.token_types))


def test_the_tokenizers_fingerprint_is_its_vocabulary():
    from transformers import BertTokenizer

    tokenizer = build_tokenizer()
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(build_tokenizer())
    swapped = [*WORDS[:-2], WORDS[-1], WORDS[-2]]
    other = BertTokenizer(vocab={word: i for i, word in enumerate(swapped)})
    before = tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(other) != before
    tokenizer.add_tokens(["a new one"])
    assert tokenizer_fingerprint(tokenizer) != before


@pytest.mark.parametrize(
    ("rank", "gpu", "told", "stays"),
    [(None, True, None, True), ("0", False, None, True), ("0", True, None, False), ("0", True, "true", True)],
)
def test_a_launched_process_uses_the_accelerator_it_was_given(monkeypatch, rank, gpu, told, stays):
    encoder = build_encoder()
    for name, value in (("LOCAL_RANK", rank), ("ACCELERATE_USE_CPU", told)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert encoder.stays_on_cpu == stays


def test_a_process_that_uses_an_accelerator_goes_on_with_it(monkeypatch):
    """Accelerate refuses `cpu=True` after a Trainer on a GPU."""
    encoder = build_encoder()
    PartialState(cpu=True)
    assert encoder.stays_on_cpu
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("cuda"))
    assert not encoder.stays_on_cpu


def test_a_base_model_that_returns_tuples():
    encoder = build_encoder()
    expected = encoder.embed(encoder.prepare(["good1 word1", "bad2"]))
    encoder.base_model.config.return_dict = False
    assert encoder.embed(encoder.prepare(["good1 word1", "bad2"])).equal(expected)


def test_lengths_that_the_model_or_the_tokenizer_cannot_keep_are_refused(encoder):
    """Before anything is trained with them: the first long text of a user would find out."""
    given = encoder.base_model, encoder.tokenizer, encoder.space
    TextEncoder(*given, max_length=128)
    for length in (129, 2, 0):
        rule = "at most 128, the positions" if length > 2 else "above the 2 special tokens of a text"
        with pytest.raises(ValueError, match=f"`max_length` must be {rule}.*got {length}"):
            TextEncoder(*given, max_length=length)
    short = TextEncoder(*given, max_length=3)
    short.prepare(["word1 word2"])
    with pytest.raises(ValueError, match="above the 3 special tokens of a pair of texts, got 3"):
        short.prepare(["word1"], ["word2"])


def test_positions_in_front_of_a_table_do_not_count():
    from transformers import RobertaConfig, RobertaModel

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = RobertaModel(RobertaConfig(vocab_size=len(WORDS), max_position_embeddings=34, **size))
    check_length(model, build_tokenizer(), 32)
    with pytest.raises(ValueError, match="at most 32, the positions of the base model, got 33"):
        check_length(model, build_tokenizer(), 33)


def test_tokens_without_an_embedding_are_named(encoder):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["brandnew"])
    other = TextEncoder(encoder.base_model, tokenizer, encoder.space)
    other.prepare(["word1"])  # a token that no text has does no harm
    with pytest.raises(
        ValueError, match=rf"gives token {len(WORDS)}, but BertModel has embeddings of {len(WORDS)} tok"
    ):
        other.prepare(["word1 brandnew"])


def test_the_fingerprint_of_tokens_that_share_an_id_does_not_depend_on_their_order():
    class Shared:
        def __init__(self, tokens):
            self.tokens = tokens

        def __len__(self):
            return len(self.tokens)

        def get_vocab(self):
            return dict(self.tokens)

    one, other = ([("a", 0), ("b", 1), ("c", 1)], [("a", 0), ("c", 1), ("b", 1)])
    assert tokenizer_fingerprint(Shared(one)) == tokenizer_fingerprint(Shared(other))
