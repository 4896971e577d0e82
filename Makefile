.PHONY: setup test tiny shaders gpu-check format

setup: ## .venv with everything for training and the tests
	bash scripts/setup.sh --dev

tiny: ## train the small chat model
	bash scripts/setup.sh
	.venv/bin/python -m gpt_jax.main --config=configs/chat_tiny.py

test: ## all tests
	bash scripts/test.sh

shaders: ## compile the shaders that changed
	.venv/bin/python -m vk_kernels.build

gpu-check: ## the kernels' tests, their comparison with float64, and their times, on whatever GPU is present
	bash scripts/gpu_check.sh

format: ## lay out the code
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
