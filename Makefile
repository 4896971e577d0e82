.PHONY: setup test tiny shaders format

setup: ## .venv with everything for training and the tests
	bash scripts/setup.sh --dev

tiny: ## train the small chat model
	bash scripts/setup.sh
	.venv/bin/python -m gpt_jax.main --config=configs/chat_tiny.py

test: ## all tests
	bash scripts/test.sh

shaders: ## compile the shaders that changed
	.venv/bin/python -m vk_kernels.build

format: ## lay out the code
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
