"""Settings that several Vulkan devices do not train, each said in one line before any work."""

import pytest

from configs import chat
from gpt_jax.errors import UserError
from gpt_jax.training.programs import check_no_dropout


@pytest.mark.parametrize("name", ["model.dropout_rate", "lora.dropout"])
def test_dropout_on_several_vulkan_devices_is_refused_with_the_ways_out(name):
    config = chat.get_config()
    config.update_from_flattened_dict({"model.dropout_rate": 0.0, "lora.dropout": 0.0})
    check_no_dropout(config)
    config.update_from_flattened_dict({name: 0.1})
    with pytest.raises(UserError, match=rf"config\.{name}=0\.1: .* only: --config\.{name}=0, or --config\.backend=xla"):
        check_no_dropout(config)
