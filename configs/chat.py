"""The reference run: a 6.84 M parameter GPT-2 that chats with Stoics and Shakespeare.

    python -m gpt_jax.main --config=configs/chat.py

Expect a loss of 8.35 at step 1, 6.46 at 500, 5.58 at 1,000, 4.72 (validation 4.84) at 2,500 and 4.25 (4.37) at
5,000; validation 3.39 after all 50,000. Gradient norm: median 2.0 over the first 5,539 steps and 4.8 over all, never
above 10. Values of the optimizer, the model and the schedule are those of the TypeScript/Vulkan run that this
project replaces.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "chat"
    config.domain = "chat"
    config.seed = 42
    config.backend = "auto"  # auto | xla | vulkan
    config.devices = ""  # of this host: empty: one | all | the first N | their numbers as "0,1"
    config.distributed = ""  # on several hosts: auto (SLURM, Open MPI) | HOST:PORT,PROCESSES,ID; see docs/scaling.md
    config.shard = "replicated"  # each device holds all parameters | fsdp: a part of them
    config.exchange_dtype = "float32"  # of gradients between Vulkan devices; bfloat16: half the bytes
    config.matmul_precision = "highest"  # of f32 products on XLA: highest | high | default (TF32 on NVIDIA)
    config.num_steps = 50_000
    config.batch_size = 16  # sequences a step
    config.accumulate_steps = 1  # parts that a batch is computed in
    config.max_skipped_steps = 5  # in a row, for a non-finite loss or gradient, before the run stops
    config.init_from = ""  # run folder or checkpoint whose parameters to start from

    config.model = ConfigDict()
    config.model.vocab_size = 4000
    config.model.block_size = 256
    config.model.num_layers = 6
    config.model.num_heads = 8
    config.model.embed_dim = 256
    config.model.mlp_dim = 0  # width of a block's MLP; 0: 4 embed_dim
    config.model.norm_epsilon = 1e-5
    config.model.dropout_rate = 0.1
    config.model.soft_cap = 30.0  # of attention scores; 0: off
    config.model.use_bias = False
    config.model.tie_head = False
    config.model.dtype = "float32"  # of matrix products and activations: float32 | bfloat16
    config.model.remat = False

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 3e-5
    config.optimizer.min_learning_rate = 3e-6
    config.optimizer.warmup_steps = 500
    config.optimizer.decay_steps = 0  # update at which the cosine ends; 0: the last one
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.99
    config.optimizer.epsilon = 1e-8
    config.optimizer.weight_decay = 0.1
    config.optimizer.decay_matrices_only = True
    config.optimizer.clip_norm = 1.0
    config.optimizer.frozen = ()  # patterns of parameters that stay as they are, such as "wte" or "h_[0-3]"
    config.optimizer.layer_decay = 1.0  # factor of the learning rate for each layer away from the output
    config.optimizer.rates = ()  # factors of the learning rate by pattern, such as "wte=0.1"

    config.lora = ConfigDict()  # adapters that are trained instead of the donor's parameters
    config.lora.rank = 0  # 0: none
    config.lora.alpha = 16.0  # an adapter's output is multiplied by alpha / rank
    config.lora.dropout = 0.0  # of an adapter's input
    config.lora.targets = ("all",)  # or some of qkv, projection, mlp_in, mlp_out, h_5/qkv, h_[0-3]

    config.data = ConfigDict()
    config.data.source = "default"  # default | a file or folder, of any format in docs/data.md | hf:NAME[:SPLIT]
    config.data.mixture = ()  # several sources in its place: ("chats.jsonl", "books")
    config.data.weights = ()  # the share of each in what is trained on; empty: equal shares
    config.data.validation = ""  # a source of its own; empty: validation_fraction of each source
    config.data.validation_fraction = 0.05
    config.data.tokenizer = ""  # a tokenizer.json to use; empty: that of init_from, else train one; new: train one
    config.data.tool_calls = "text"  # how calls of tools are read: text | refuse
    config.data.on_error = "stop"  # at a bad row or dialogue: stop | skip, and list it
    config.data.targets = "all"  # what the loss counts: all | assistant
    config.data.cache_dir = ""  # empty: ~/.cache/gpt_jax
    config.data.prefetch = 8  # batches

    config.eval = ConfigDict()
    config.eval.every = 2500  # steps, and once at the end; 0: never
    config.eval.batches = 10
    config.eval.patience = 0  # evaluations in a row without a lower loss, after which the run ends; 0: it does not

    config.sample = ConfigDict()
    config.sample.every = 500  # steps, and once at the end; 0: never
    config.sample.temperature = 0.8
    config.sample.top_k = 40
    config.sample.top_p = 1.0  # share of the probability that is drawn from, likeliest tokens first; 1: all
    config.sample.min_p = 0.0  # share of the largest probability that a token needs; 0: none
    config.sample.repetition_penalty = 1.0  # of tokens in the text, the question's too; 1: none
    config.sample.presence_penalty = 0.0  # of tokens in the answer; 0: none
    config.sample.frequency_penalty = 0.0  # the same, each time that they came
    config.sample.max_tokens = 80
    config.sample.stop = ()  # texts that end an answer
    config.sample.prompts = (
        "What does it mean to live well?",
        "How should I face the fear of death?",
        "Who's there?",
    )

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 2500  # steps; 0: only at the end and when the run is stopped
    config.checkpoint.keep_last = 2
    config.checkpoint.keep_every = 10_000  # 0: none; the best by validation loss is always saved and kept

    config.vulkan = ConfigDict()
    config.vulkan.submit_ms = 0.0  # cuts a step into submissions no longer, for GPUs with a watchdog; 0: whole

    config.log = ConfigDict()
    config.log.every = 50  # steps between two lines of progress; 0: none
    config.log.diagnostics_every = 500  # attention statistics by head; as eval.every
    config.log.tensorboard = True
    config.log.tracker = "none"  # beside it: none | wandb | trackio | mlflow, each an extra of that name
    config.log.webhook = ""  # a URL that alerts are posted to, or $NAME of an environment variable with one
    config.log.profile_step = 0  # the profiler records from here (0: not at all)
    config.log.profile_steps = 3
    return config
