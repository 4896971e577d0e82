.PHONY: setup test quick types jax-versions night campaign tiny shaders gpu-check format

setup: ## .venv with everything for training and the tests
	bash scripts/setup.sh --dev

tiny: ## train the small chat model
	bash scripts/setup.sh
	.venv/bin/python -m gpt_jax.main --config=configs/chat_tiny.py

test: ## all tests
	bash scripts/test.sh

quick: ## the tests that need no Vulkan device, without those marked slow
	.venv/bin/python -m pytest -n auto -m "not vulkan"

types: ## what the type checker says
	.venv/bin/pyrefly check --python-interpreter-path .venv/bin/python

jax-versions: ## the tests on jax 0.10.2, 0.11 and 0.12; ARGS="tests/compiler"
	bash scripts/jax_versions.sh $(ARGS)

night: ## the tests on drawn inputs, 200 of each, those that take long, and 10,000 calls watched for leaks
	HYPOTHESIS_PROFILE=night .venv/bin/python -m pytest -n auto --dist load tests/ops/test_op_properties.py tests/compiler tests/bridge tests/tools/test_conformance.py tests/ops/test_attention.py tests/ops/test_matmul.py tests/inference/test_decoder.py tests/ops/test_api.py::test_mixed_calls_keep_memory_and_files_flat

campaign: ## kills, signals, damage, full disks and bad inputs by the hundred; ARGS="--kills=20 --minutes=30 --seed=1"
	.venv/bin/python tests/campaign/campaign.py $(ARGS)

shaders: ## compile the shaders that changed
	.venv/bin/python -m vk_kernels.tools.build_shaders

gpu-check: ## the kernels' tests, their comparison with float64, their times, and whether steps got slower, on whatever GPU is present
	bash scripts/gpu_check.sh

format: ## lay out the code
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
