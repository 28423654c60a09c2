import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPTNeoConfig, LlamaConfig, OPTConfig
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from lightweight.captured.frozen import Lean
from lightweight.preload import peft

SMALL = {"vocab_size": 64, "hidden_size": 32, "max_position_embeddings": 64}
CONFIGS = {
    "gpt-neo": GPTNeoConfig(num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], **SMALL),
    "opt": OPTConfig(
        num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0, **SMALL
    ),
    "opt-post-norm": OPTConfig(
        **SMALL,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=64,
        word_embed_proj_dim=16,
        dropout=0.0,
        do_layer_norm_before=False,
    ),
    "llama": LlamaConfig(num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, **SMALL),
}


def build(name, folder, dropout=0.0, targets="all-linear", four_bit=False):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    if four_bit:
        model.save_pretrained(folder)
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    torch.manual_seed(1)
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets)
    network = peft.get_peft_model(model, adapter).train()
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)  # B starts at zero, which would hide A
    return network


def loss_and_gradients(network):
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(3)).to(network.device)
    loss = network(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    return loss.item(), gradients


@pytest.mark.filterwarnings("ignore:inner dimension:UserWarning")  # bitsandbytes' fast kernel wants larger layers
@pytest.mark.parametrize("four_bit", [False, True], ids=["whole", "4-bit"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]], ids=["all", "q and v"])
@pytest.mark.parametrize("name", CONFIGS)
def test_lean_layers_have_pefts_loss_and_gradients(name, targets, four_bit, tmp_path):
    reference, network = (build(name, tmp_path, targets=targets, four_bit=four_bit) for _ in range(2))
    expected_loss, expected = loss_and_gradients(reference)
    lean = Lean(network)
    assert lean.changed
    loss, found = loss_and_gradients(network)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    for key, gradient in found.items():
        assert torch.allclose(gradient, expected[key], atol=1e-5), key


@pytest.mark.parametrize("name", CONFIGS)
def test_dropouts_gradient_is_that_of_the_elements_it_kept(name, tmp_path):
    """Along a direction in the weights, the loss must change as the gradient says, under the same masks."""
    network = build(name, tmp_path, dropout=0.5).double()
    for module in network.modules():
        if isinstance(module, OPTDecoderLayer):
            module.dropout = 0.3  # of the model's own
    Lean(network)
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(3))
    weights = [p for p in network.parameters() if p.requires_grad]
    directions = [torch.randn_like(p) for p in weights]

    def move(distance):
        with torch.no_grad():
            for weight, direction in zip(weights, directions, strict=True):
                weight += distance * direction

    def loss(seed=7):
        torch.manual_seed(seed)
        logits = network(input_ids=ids, use_cache=False).logits  # transformers' own loss is fp32, too coarse for this
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    here = loss()
    here.backward()
    slope = sum((p.grad * direction).sum() for p, direction in zip(weights, directions, strict=True)).item()
    move(1e-6)
    ahead = loss().item()
    move(-2e-6)
    behind = loss().item()
    assert slope == pytest.approx((ahead - behind) / 2e-6, rel=2e-3)  # GPT-Neo's eager scores are fp32
    assert loss(seed=8).item() != pytest.approx(here.item(), rel=1e-5)


def kept_bytes(network):
    """What the forward pass keeps for the backward pass, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(64, (8, 32))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = network.get_base_model().base_model(input_ids=ids, use_cache=False).last_hidden_state
        assert hidden.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(("name", "share"), [("gpt-neo", 0.55), ("opt", 0.75), ("llama", 0.5)])
def test_lean_layers_keep_less(name, share, tmp_path):
    network = build(name, tmp_path, dropout=0.1)
    before = kept_bytes(network)
    lean = Lean(network)
    assert kept_bytes(network) < share * before
    lean.undo()
    assert kept_bytes(network) == before


def test_what_is_not_plain_lora_is_left_alone(tmp_path):
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    assert not Lean(model).changed  # everything is trained
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", use_dora=True, target_modules="all-linear")
    assert not Lean(peft.get_peft_model(model, adapter)).changed
