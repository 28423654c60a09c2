from transformers import AutoModelForCausalLM, OPTConfig

from lightweight.internals import peft as peft_internals
from lightweight.preload import peft


def test_the_layers_of_an_adapter_are_known_before_it_is_put_on():
    network = AutoModelForCausalLM.from_config(
        OPTConfig(
            vocab_size=16, hidden_size=8, ffn_dim=8, word_embed_proj_dim=8, num_hidden_layers=1, num_attention_heads=2
        )
    )
    adapter = peft.LoraConfig(task_type=peft.TaskType.CAUSAL_LM, target_modules="all-linear")
    chosen = peft_internals.chosen_layers(adapter, network)
    assert {place.rpartition(".")[2] for place in chosen} == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    on = peft.get_peft_model(network, adapter)
    adapted = {name for name, module in on.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert {name.removeprefix("base_model.model.") for name in adapted} == chosen
