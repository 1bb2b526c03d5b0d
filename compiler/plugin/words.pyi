"""Words of recipes, from their headers: `python -m effc.compiler.plugin.word_stubs` writes this file."""

from collections.abc import Sequence
from typing import Literal

from ...dsl.syntax.builder import Value

class clean:
    @staticmethod
    def dead(*, align: int | Value = ...) -> Value:
        """Remove what contributes exactly zero.

        align: Widths of MLPs stay multiples of this.
        """

class data:
    @staticmethod
    def chat(path: str | Sequence[str] | Value, *, length: int | Value, messages: str | Value = ..., prompt: str | Value | None = ..., response: str | Value | None = ..., samples: int | Value | None = ..., seed: int | Value | None = ...) -> Value:
        """Windows of tokens from conversations.

        path: JSONL, JSON, CSV or TSV file, glob, or list of them.
        length: Tokens in a row.
        messages: Field that holds the messages.
        prompt: Field of the prompt, in place of messages.
        response: Field of the response, in place of messages.
        samples: How many rows; all of them where it is left out.
        seed: Decides which rows; the run's own seed where it is left out.
        """
    @staticmethod
    def choices(path: str | Sequence[str] | Value, *, question: str | Value = ..., options: str | Sequence[str] | Value = ..., fixed: Sequence[str] | Value | None = ..., answer: str | Value = ..., layout: Literal['qa', 'plain'] | Value = ..., length: int | Value = ..., samples: int | Value | None = ..., seed: int | Value | None = ...) -> Value:
        """Questions with several answers of which one is right.

        path: JSONL, JSON, CSV or TSV file, glob, or list of them.
        question: Field of the question.
        options: Field of the list of options, or a list of fields.
        fixed: Options that every record has, in place of a field.
        answer: Field of the answer.
        layout: `qa` writes `Question: …`, a line end and `Answer:`; `plain` the question alone.
        length: Tokens in a row, where it is used as rows.
        samples: How many questions; all of them where it is left out.
        seed: Decides which rows; the run's own seed where it is left out.
        """
    @staticmethod
    def generated(count: int | Value = ..., *, length: int | Value = ..., temperature: float | Value = ..., seed: int | Value | None = ...) -> Value:
        """Text that the model itself writes, each token drawn from what the model predicts.

        count: How many rows.
        length: Tokens in a row, the first one included.
        temperature: What logits are divided by before a token is drawn.
        seed: Decides the draws; the run's own seed where it is left out.
        """
    @staticmethod
    def hub(name: str | Value, *, length: int | Value, split: str | Value = ..., config: str | Value | None = ..., revision: str | Value | None = ..., field: str | Value = ..., samples: int | Value | None = ..., seed: int | Value | None = ..., start: Literal['auto', 'always', 'never'] | Value = ...) -> Value:
        """Windows of tokens from a data set of the hub, or of local files in its formats.

        name: Data set, or a local json, jsonl, csv, parquet or txt file or folder.
        length: Tokens in a row, a start token included.
        split: Which part; slices such as `train[:1%]` work.
        config: Configuration of the data set.
        revision: Branch, tag or commit of the data set.
        field: Field that holds the text.
        samples: How many rows; all of them where it is left out.
        seed: Decides which rows; the run's own seed where it is left out.
        start: Whether rows begin with the start token; `auto` does what the tokenizer does.
        """
    @staticmethod
    def images(path: str | Value, *, images: str | Value = ..., classes: str | Value | None = ..., samples: int | Value | None = ..., seed: int | Value | None = ...) -> Value:
        """Images, each with a class, for models that look at them.

        path: A safetensors file, relative to the recipe.
        images: Name of the tensor of images.
        classes: Name of the tensor of classes; rows have none where it is left out.
        samples: How many rows; all of them where it is left out.
        seed: Decides which rows; the run's own seed where it is left out.
        """
    @staticmethod
    def labels(path: str | Sequence[str] | Value, *, classes: Sequence[str] | Value, length: int | Value, text: str | Value = ..., label: str | Value = ..., longer: Literal['refuse', 'drop'] | Value = ..., samples: int | Value | None = ..., seed: int | Value | None = ...) -> Value:
        """Texts with a class each, for models that end in a head.

        path: JSONL, JSON, CSV or TSV file, glob, or list of them.
        classes: Labels as records have them, in the order of the head's outputs.
        length: Tokens in a row.
        text: Field of the text.
        label: Field of the label.
        longer: What becomes of texts that fit into no row.
        samples: How many rows; all of them where it is left out.
        seed: Decides which rows; the run's own seed where it is left out.
        """
    @staticmethod
    def pairs(path: str | Sequence[str] | Value, *, length: int | Value, prompt: str | Value = ..., answer: str | Value = ..., join: str | Value = ..., longer: Literal['refuse', 'drop'] | Value = ..., samples: int | Value | None = ..., seed: int | Value | None = ...) -> Value:
        """Prompts and their answers, a row each.

        path: JSONL, JSON, CSV or TSV file, glob, or list of them.
        length: Tokens in a row.
        prompt: Field of the prompt.
        answer: Field of the answer.
        join: What stands between them; it begins the answer.
        longer: What becomes of pairs that fit into no row.
        samples: How many rows; all of them where it is left out.
        seed: Decides which rows; the run's own seed where it is left out.
        """
    @staticmethod
    def sounds(path: str | Sequence[str] | Value, *, length: int | Value, sound: str | Value = ..., text: str | Value = ..., longer: Literal['refuse', 'drop'] | Value = ..., samples: int | Value | None = ..., seed: int | Value | None = ...) -> Value:
        """Recordings with what is said in them, for models that hear.

        path: JSONL, JSON, CSV or TSV file, glob, or list of them.
        length: Tokens of a target.
        sound: Field of the WAV file's path.
        text: Field of what is said.
        longer: What becomes of texts that fit into no row.
        samples: How many rows; all of them where it is left out.
        seed: Decides which rows; the run's own seed where it is left out.
        """
    @staticmethod
    def synthetic(count: int | Value = ..., *, length: int | Value = ..., seed: int | Value | None = ...) -> Value:
        """Random token ids, or whatever else a model takes, for tests of shape and speed.

        count: How many rows.
        length: Tokens in a row.
        seed: Decides the ids; the run's own seed where it is left out.
        """
    @staticmethod
    def tensors(path: str | Value, *, samples: int | Value | None = ..., seed: int | Value | None = ...) -> Value:
        """Rows of whatever a model takes, made elsewhere: a tensor for each input.

        path: A safetensors file, relative to the recipe.
        samples: How many rows; all of them where it is left out.
        seed: Decides which rows; the run's own seed where it is left out.
        """
    @staticmethod
    def text(path: str | Sequence[str] | Value, *, length: int | Value, skip: int | Value = ..., start: Literal['auto', 'always', 'never'] | Value = ..., samples: int | Value | None = ..., seed: int | Value | None = ...) -> Value:
        """Windows of tokens from text files.

        path: File, glob, or list of them, relative to the recipe.
        length: Tokens in a row, a start token included.
        skip: Rows passed over first, in that order: those of another data set.
        start: Whether rows begin with the start token; `auto` does what the tokenizer does.
        samples: How many rows; all of them where it is left out.
        seed: Decides which rows; the run's own seed where it is left out.
        """
    @staticmethod
    def texts(path: str | Sequence[str] | Value, *, length: int | Value, fields: Sequence[str] | Value = ..., longer: Literal['cut', 'drop', 'refuse'] | Value = ..., samples: int | Value | None = ..., seed: int | Value | None = ...) -> Value:
        """Short texts, a row each.

        path: File, glob, or list of them, relative to the recipe.
        length: Tokens in a row, special tokens included.
        fields: Fields of the text, one or two.
        longer: What becomes of records that fit into no row.
        samples: How many records; all of them where it is left out.
        seed: Decides which rows; the run's own seed where it is left out.
        """
    @staticmethod
    def tokens(path: str | Value, *, tensor: str | Value | None = ..., samples: int | Value | None = ..., seed: int | Value | None = ...) -> Value:
        """Rows of token ids that were made elsewhere.

        path: A safetensors file, relative to the recipe.
        tensor: Name of the tensor; the only one where it is left out.
        samples: How many rows; all of them where it is left out.
        seed: Decides which rows; the run's own seed where it is left out.
        """

class lower:
    @staticmethod
    def cpu_scan() -> Value:
        """Run the scans and convolutions of state-space mixers on effc's kernels.
        """
    @staticmethod
    def group_queries(*, on: str | Value | None = ...) -> Value:
        """Decode with the query heads that share keys as rows of one product.

        on: Which attention modules; all where it is left out.
        """
    @staticmethod
    def mixed(*, keep: str | Value, data: str | Value = ..., on: str | Value | None = ..., formats: Sequence[Literal['dense_bf16', 'sparse_bf16', 'dense_int8', 'sparse_int8', 'dense_int8_int16', 'dense_int4']] | Value = ..., zeros: Sequence[str] | Value = ...) -> Value:
        """Give every linear module the number format, and the zeros, that lose least under one budget.

        keep: Share of the modules' bytes, or of the time that torch takes for them, that is left.
        data: Rows that losses are measured on.
        on: Linear modules; all inside the layers where it is left out.
        formats: Formats to choose from.
        zeros: Shares of zeros to try with each sparse format.
        """
    @staticmethod
    def sparse_cpu(*, on: str | Value | None = ..., format: Literal['auto', 'dense_bf16', 'sparse_bf16', 'dense_int8', 'sparse_int8', 'dense_int8_int16', 'dense_int4', 'block'] | Value = ..., isa: Literal['native', 'portable', 'avx2', 'avx512', 'avx512_bf16', 'amx', 'neon'] | Value = ..., machine: str | Value | None = ..., timings: str | Value | None = ..., rows: int | Value = ..., error: float | Value = ..., data: str | Value | None = ..., divergence: float | Value = ...) -> Value:
        """Let linear modules run the native kernel that is fastest for each, or stay as they are.

        on: Linear modules; all where it is left out.
        format: What wins, or one format for all, unmeasured.
        isa: Level of instruction sets that the kernels will run at.
        machine: The machine that it will run on, by its instruction set and threads.
        timings: File with timings of another machine: a manifest.json written there.
        rows: Rows that the kernels race with: sequences that are decoded together.
        error: Share of its size by which a module's output may be off on int8 or int4.
        data: Rows that accuracy is measured on; unless given, 32 that the model itself writes.
        divergence: Nats by which predictions may move on average.
        """
    @staticmethod
    def sparse_kv(*, keep: str | Value, keys: str | Value | None = ..., values: str | Value | None = ..., window: int | Value = ..., sinks: int | Value = ..., on: str | Value | None = ..., data: str | Value | None = ..., divergence: float | Value = ...) -> Value:
        """Decode over a cache of keys and values that forgets what is small.

        keep: Share of the numbers of a block that stays.
        keys: The same of keys, where they are to keep another share.
        values: The same of values.
        window: Newest tokens that stay whole, a multiple of 32.
        sinks: First tokens that stay whole, rounded up to 32.
        on: Which attention modules; all where it is left out.
        data: Rows that accuracy is measured on; unless given, 32 that the model itself writes.
        divergence: Nats by which predictions may move on average while decoding.
        """

class metrics:
    class decode:
        @staticmethod
        def p50(*, prompt: int | Value = ..., steps: int | Value = ...) -> Value:
            """Median time to decode one token.

            prompt: Tokens of the prompt.
            steps: How many tokens are timed.
            """
        @staticmethod
        def p95(*, prompt: int | Value = ..., steps: int | Value = ...) -> Value:
            """95th percentile of the time to decode one token.

            prompt: Tokens of the prompt.
            steps: How many tokens are timed.
            """

    class prefill:
        @staticmethod
        def p50(*, prompt: int | Value = ..., repeats: int | Value = ...) -> Value:
            """Median time to prefill a prompt.

            prompt: Tokens of the prompt.
            repeats: How many forwards are timed.
            """
        @staticmethod
        def p95(*, prompt: int | Value = ..., repeats: int | Value = ...) -> Value:
            """95th percentile of the time to prefill a prompt.

            prompt: Tokens of the prompt.
            repeats: How many forwards are timed.
            """

    @staticmethod
    def accuracy(data: str | Value = ...) -> Value:
        """Accuracy of a model with a classification head.

        data: Rows with a class each.
        """
    @staticmethod
    def agreement(data: str | Value = ...) -> Value:
        """Share of positions at which a model's most probable token is the original's.

        data: Rows to predict.
        """
    @staticmethod
    def bytes() -> Value:
        """Bytes of a model's weights.
        """
    @staticmethod
    def choice(data: str | Value = ..., *, normalised: bool | Value = ...) -> Value:
        """Accuracy on multiple-choice questions.

        data: Questions, made by `choices`.
        normalised: Divide by the option's length in characters.
        """
    @staticmethod
    def divergence(data: str | Value = ...) -> Value:
        """KL divergence of a model's predictions from the original's.

        data: Rows to predict.
        """
    @staticmethod
    def flops(*, context: int | Value = ...) -> Value:
        """Number of operations per decoded token, or per image.

        context: Positions that the token attends to.
        """
    @staticmethod
    def lm_eval(task: str | Value, *, score: str | Value = ..., shots: int | Value = ..., limit: int | Value | None = ..., batch: int | Value = ..., tasks: str | Value | None = ...) -> Value:
        """The score of a task of EleutherAI's evaluation harness.

        task: Name of the task.
        score: Which of the task's scores.
        shots: Solved examples in front of every question.
        limit: How many questions; all of them where it is left out.
        batch: Questions that run together.
        tasks: Folder of own task files, relative to the recipe.
        """
    @staticmethod
    def params() -> Value:
        """Number of parameters of a model.
        """
    @staticmethod
    def perplexity(data: str | Value = ..., *, decoded: int | Value | None = ...) -> Value:
        """Perplexity of a model on text, per token.

        data: Rows to predict.
        decoded: Last tokens of each row, fed one by one over the cache, which alone are counted; where it is left out, all tokens, read at once.
        """
    @staticmethod
    def retrieval(data: str | Value = ..., *, score: Literal['recall', 'mrr'] | Value = ..., pooling: Literal['auto', 'mean', 'first', 'last', 'max', 'own'] | Value = ...) -> Value:
        """Retrieval quality: how well a model finds, for each text, its counterpart.

        data: Texts and their partners, made by `texts` from two fields.
        score: First place alone, or 1 / rank.
        pooling: How states of tokens become the vector of a text: see `similarity`.
        """
    @staticmethod
    def similarity(data: str | Value = ..., *, of: Literal['both', 'pooled', 'tokens'] | Value = ..., by: Literal['cosine', 'cka'] | Value = ..., pooling: Literal['auto', 'mean', 'first', 'last', 'max', 'own'] | Value = ...) -> Value:
        """Cosine similarity of a model's hidden states to the original's.

        data: Rows to encode.
        of: Vectors of rows, states of tokens, or both.
        by: How states are compared.
        pooling: How states of tokens become the vector of a row.
        """
    @staticmethod
    def throughput(*, batch: int | Value = ..., prompt: int | Value = ..., steps: int | Value = ...) -> Value:
        """Decoded tokens per second.

        batch: Sequences that are decoded together.
        prompt: Tokens of each prompt.
        steps: How many tokens of each sequence are timed.
        """

class models:
    @staticmethod
    def config(path: str | Value, *, seed: int | Value = ..., dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] | Value = ...) -> Value:
        """A model with random weights, from its config alone.

        path: A config.json, relative to the recipe.
        seed: Decides the weights.
        dtype: What weights are held and computed in; `auto` is what the config says, else float32.
        """
    @staticmethod
    def gguf(path: str | Value, *, dtype: Literal['float32', 'bfloat16', 'float16'] | Value = ...) -> Value:
        """A model in a GGUF file, as llama.cpp uses it.

        path: The file, relative to the recipe.
        dtype: What weights are held and computed in; float32 is exact.
        """
    @staticmethod
    def hf(name: str | Value, *, revision: str | Value = ..., dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] | Value = ...) -> Value:
        """A model in the Hugging Face layout: a folder, or a repository of the hub.

        name: Folder or repository.
        revision: Branch, tag or commit of the repository; no meaning for a folder.
        dtype: What weights are held and computed in; `auto` keeps the files' own.
        """
    @staticmethod
    def module(place: str | Value, *, config: str | Value | None = ..., seed: int | Value = ...) -> Value:
        """A module that the user's own Python file makes.

        place: File and function, `file.py:make`, relative to the recipe.
        config: A JSON file that the function is given as a dict.
        seed: Seeds torch before the function runs.
        """
    @staticmethod
    def zoo(name: str | Value) -> Value:
        """A small model that is part of effc.

        name: Name of the model.
        """

class prune:
    @staticmethod
    def apply(path: str | Value, *, reorder: Literal['l1', 'none'] | Value = ...) -> Value:
        """Cut what a `pruning_config.json` says.

        path: The file, relative to the recipe.
        reorder: Which items stay: those of largest magnitude, or the first.
        """
    @staticmethod
    def blocks(*, remove: int | str | Value, score: str | Value = ..., on: str | Value | None = ..., unit: Literal['branch', 'layer'] | Value = ..., search: Literal['racing', 'exact'] | Value = ...) -> Value:
        """Remove whole residual branches or layers, the least missed first.

        remove: How many to remove, or what share of them or of all parameters.
        score: What the model is scored by without each candidate.
        on: Which may go: paths of attention or MLP modules, or of layers.
        unit: Remove single branches, or whole layers.
        search: Score what may be missed least, or everything.
        """
    @staticmethod
    def channels(*, keep: str | Value, on: str | Value | None = ..., align: int | Value = ..., reorder: Literal['l1', 'wanda', 'obs'] | Value | None = ..., repair: bool | Value = ..., data: str | Value | None = ..., score: str | Value | None = ..., search: Literal['racing', 'exact'] | Value = ...) -> Value:
        """Make MLPs narrower.

        keep: Share of the channels, or of all parameters, that stays.
        on: Which MLPs.
        align: Widths are multiples of this, and it is the step of the search.
        reorder: Which items of a module go first: by weights, by weights and inputs, or by the error left after repair; obs with a score, else l1.
        repair: With a score, refit what reads the items that go.
        data: Rows that items are ranked and readers refitted on, several thousand tokens, not the score's; unless given, 32 that the model itself writes.
        score: What decides which modules lose more; without it all lose alike.
        search: With a score: try what may be best, or everything.
        """
    @staticmethod
    def experts(*, keep: str | Value, on: str | Value | None = ..., data: str | Value | None = ...) -> Value:
        """Remove whole experts.

        keep: Share of the experts that stays.
        on: Which layers of experts.
        data: Rows on which the router's weights are summed.
        """
    @staticmethod
    def heads(*, keep: str | Value, on: str | Value | None = ..., reorder: Literal['l1', 'wanda', 'obs'] | Value | None = ..., repair: bool | Value = ..., data: str | Value | None = ..., score: str | Value | None = ..., search: Literal['racing', 'exact'] | Value = ...) -> Value:
        """Remove attention heads.

        keep: Share of the query heads or KV heads that stays.
        on: Which attention modules.
        reorder: Which items of a module go first: by weights, by weights and inputs, or by the error left after repair; obs with a score, else l1.
        repair: With a score, refit what reads the items that go.
        data: Rows that items are ranked and readers refitted on, several thousand tokens, not the score's; unless given, 32 that the model itself writes.
        score: What decides which modules lose more; without it all lose alike.
        search: With a score: try what may be best, or everything.
        """
    @staticmethod
    def hidden(*, keep: str | Value, data: str | Value | None = ..., reorder: Literal['l1', 'norms', 'wanda'] | Value | None = ..., repair: bool | Value = ..., align: int | Value = ...) -> Value:
        """Make the residual stream narrower.

        keep: Share of the stream's channels, or of all parameters, that stays.
        data: Rows on which channels are ranked, and what reads them refitted.
        reorder: Which channels go first: by weights, by what norms give, or by the share of the readers' outputs that comes through them; wanda with data, else l1.
        repair: With data, refit what reads the channels that go.
        align: The width is a multiple of this, the largest that is at most `keep`.
        """
    @staticmethod
    def multi(*, remove: str | Value, score: str | Value = ..., split: dict[str, float] | Value | None = ..., order: Sequence[Literal['blocks', 'channels', 'heads']] | Value = ..., reorder: Literal['l1', 'wanda', 'obs'] | Value | None = ..., group: int | Value = ..., heads: int | Value = ..., width_score: str | Value | None = ..., machine: str | Value | None = ..., check: str | Value | None = ..., on: str | Value | None = ..., search: Literal['racing', 'exact'] | Value = ..., rank: Literal['ratio', 'loss'] | Value | None = ..., estimate: Literal['none', 'taylor'] | Value = ..., together: int | Value = ..., repair: bool | Value | None = ..., data: str | Value | None = ..., overshoot: bool | Value = ..., clock: str | Value = ...) -> Value:
        """Prune blocks, MLP channels and attention heads, whatever the model misses least.

        remove: Share of the parameters, their bytes, the operations per token or the latency that goes.
        score: What the model is scored by without each candidate.
        split: How what goes is split between kinds that take turns; without it they compete.
        order: The kinds that may be cut, and with `split` whose turn comes when.
        reorder: Which channels and heads of a module go first: by weights, by weights and inputs, or by the error left after repair; l1 in an exact search, else obs.
        group: Channels per cut.
        heads: KV heads per cut.
        width_score: What channels and heads are scored by, if not by `score`.
        machine: The machine whose latency counts: the compile runs there, with the profile's threads.
        check: The same on other rows, measured now and then: what grows faster there was fitted to the score's rows.
        on: Which attention and MLP modules may be cut.
        search: Score what may win, or everything.
        rank: By loss per unit saved, or by plain loss, which an exact search takes unless told.
        estimate: What a racing search knows of candidates before it scores them: `taylor` leaves out those that gradients show to lose.
        together: Cuts of different layers that a racing search makes at once.
        repair: Refit what reads the items that go; no in an exact search, else yes.
        data: Rows that items are ranked and readers refitted on, several thousand tokens, not the score's; unless given, 32 that the model itself writes.
        overshoot: Whether more than half of the goal may go beyond it, where no part that is left is smaller; an exact search does that as published.
        clock: Which latency, measured on the machine that compiles.
        """

class quantize:
    @staticmethod
    def gptq(*, data: str | Value = ..., order: Literal['activation', 'given'] | Value = ..., sweeps: int | Value = ..., damping: float | Value = ..., bits: int | Value = ..., group: int | Value = ..., on: str | Value | None = ..., zero: Literal['free', 'middle'] | Value = ..., scales: Literal['range', 'search'] | Value = ...) -> Value:
        """Round weights of linear modules to few values, and let the weights behind each make up for it.

        data: Rows whose inputs of the modules count; more tokens than a module has inputs.
        order: Large inputs first, on scales fitted before; or as they lie, on scales fitted as they come.
        sweeps: How often scales and codes are looked at again, given all others.
        damping: What is added to the inputs' squares, as a share of their mean.
        bits: Bits of a code.
        group: Inputs of an output that share a scale; 0 for all.
        on: Linear modules; all inside the layers where it is left out.
        zero: Whether 0 is any code, or the middle one.
        scales: Scales that reach the largest weight, or for which the squared error is least.
        """
    @staticmethod
    def round(*, bits: int | Value = ..., group: int | Value = ..., on: str | Value | None = ..., zero: Literal['free', 'middle'] | Value = ..., scales: Literal['range', 'search'] | Value = ...) -> Value:
        """Round weights of linear modules to the nearest of few values.

        bits: Bits of a code.
        group: Inputs of an output that share a scale; 0 for all.
        on: Linear modules; all inside the layers where it is left out.
        zero: Whether 0 is any code, or the middle one.
        scales: Scales that reach the largest weight, or for which the squared error is least.
        """
    @staticmethod
    def scale(*, data: str | Value = ..., inputs: Literal['exact', 'int8'] | Value = ..., bits: int | Value = ..., group: int | Value = ..., on: str | Value | None = ..., zero: Literal['free', 'middle'] | Value = ..., scales: Literal['range', 'search'] | Value = ...) -> Value:
        """Scale what linear modules are given, so that rounding their weights loses less.

        data: Rows whose inputs of the modules count.
        inputs: Whether modules are given numbers as they are, or rounded to int8 token by token.
        bits: Bits of a code.
        group: Inputs of an output that share a scale; 0 for all.
        on: Linear modules; all inside the layers where it is left out.
        zero: Whether 0 is any code, or the middle one.
        scales: Scales that reach the largest weight, or for which the squared error is least.
        """

class reft:
    @staticmethod
    def insert(*, form: Literal['loreft', 'direft', 'noreft', 'odireft', 'consreft', 'lobireft'] | Value = ..., on: str | Value | None = ..., positions: str | Value = ..., rank: int | Value = ..., tied: bool | Value = ..., dropout: float | Value = ..., start: Literal['identity', 'random'] | Value = ...) -> Value:
        """Insert interventions that edit hidden states of the prompt, for `tune.reft` to train.

        form: What an edit computes.
        on: Layers after which hidden states are edited; all where it is left out.
        positions: Which of the prompt: `f7` its first seven, `l7` its last seven, `f7+l7` both.
        rank: How many coordinates of a hidden state an edit changes.
        tied: One function for the first and the last positions; false: one for each.
        dropout: Probability that a number of an edited hidden state is dropped in training.
        start: What they do before they are trained: nothing, or what comes.
        """

class search:
    @staticmethod
    def front(*, points: Sequence[str] | Value, measure: Sequence[str] | Value, keep: Literal['all', 'best'] | Value = ...) -> Value:
        """Gather results of several steps as a front: models with their measures, to pick from later.

        points: Steps whose results are the points.
        measure: What is measured of each, the most telling first.
        keep: Every point, or those that no other one beats in all measures.
        """
    @staticmethod
    def heuristic(*, measure: Sequence[str] | Value, report: Sequence[str] | Value = ..., at_most: str | Value | None = ..., evals: int | Value = ..., points: int | Value = ...) -> Value:
        """Evaluate the few choices of a family that training speaks for.

        measure: What choices are good at, the most telling first.
        report: What is measured of the front alone, on rows not selected by.
        at_most: The most that a choice may have, as a share of the largest one.
        evals: Choices that are evaluated, at most.
        points: Choices on the front, at most.
        """
    @staticmethod
    def hill(*, measure: Sequence[str] | Value, report: Sequence[str] | Value = ..., at_most: str | Value | None = ..., evals: int | Value = ..., points: int | Value = ...) -> Value:
        """Climb from choices of a family to better neighbours.

        measure: What choices are good at, the most telling first.
        report: What is measured of the front alone, on rows not selected by.
        at_most: The most that a choice may have, as a share of the largest one.
        evals: Choices that are evaluated, at most.
        points: Choices on the front, at most.
        """
    @staticmethod
    def nsga2(*, measure: Sequence[str] | Value, population: int | Value = ..., report: Sequence[str] | Value = ..., at_most: str | Value | None = ..., evals: int | Value = ..., points: int | Value = ...) -> Value:
        """Evolve choices of a family by NSGA-II.

        measure: What choices are good at, the most telling first.
        population: Choices of a generation.
        report: What is measured of the front alone, on rows not selected by.
        at_most: The most that a choice may have, as a share of the largest one.
        evals: Choices that are evaluated, at most.
        points: Choices on the front, at most.
        """
    @staticmethod
    def predict(*, measure: Sequence[str] | Value, pool: int | Value = ..., report: Sequence[str] | Value = ..., at_most: str | Value | None = ..., evals: int | Value = ..., points: int | Value = ...) -> Value:
        """Let a model of few evaluations say which choices of a family are worth one.

        measure: What choices are good at, the most telling first.
        pool: Choices that are foretold for each that is evaluated.
        report: What is measured of the front alone, on rows not selected by.
        at_most: The most that a choice may have, as a share of the largest one.
        evals: Choices that are evaluated, at most.
        points: Choices on the front, at most.
        """
    @staticmethod
    def random(*, measure: Sequence[str] | Value, report: Sequence[str] | Value = ..., at_most: str | Value | None = ..., evals: int | Value = ..., points: int | Value = ...) -> Value:
        """Evaluate choices of a family that are drawn at random.

        measure: What choices are good at, the most telling first.
        report: What is measured of the front alone, on rows not selected by.
        at_most: The most that a choice may have, as a share of the largest one.
        evals: Choices that are evaluated, at most.
        points: Choices on the front, at most.
        """
    @staticmethod
    def steps(*, optimize: str | Value, data: str | Value = ..., choose: str | Value = ..., within: str | Value, against: str | Value | None = ..., train: str | Value | None = ..., among: Sequence[str] | Value = ...) -> Value:
        """Leave the steps open: `effc tune` searches those that keep all bounds and are best at one metric.

        optimize: Metric to be best at, such as decode.p50 or bytes.
        data: Rows that the passes read.
        choose: Other rows, that candidates are measured on.
        within: Time for the search; the best candidate is compiled after it.
        against: Second metric: up to five candidates between both are compiled, the front, in place of the best one.
        train: Rows to heal pruned candidates on; without them nothing is trained.
        among: Patterns of the passes and formats to choose from, such as "sparsify.*" or "int4"; all where it is empty.
        """

class shed:
    @staticmethod
    def blocks(*, remove: int | str | Value, score: str | Value = ..., on: str | Value | None = ..., search: Literal['racing', 'exact'] | Value = ...) -> Value:
        """Remove whole state-space blocks, the least missed first.

        remove: How many blocks to remove, or what share of them or of the whole model.
        score: What the model is scored by without each candidate.
        on: Which mixers may go.
        search: Score what may be missed least, or everything.
        """
    @staticmethod
    def channels(*, keep: str | Value, on: str | Value | None = ..., align: int | Value = ..., repair: bool | Value = ..., data: str | Value | None = ..., score: str | Value | None = ..., search: Literal['racing', 'exact'] | Value = ...) -> Value:
        """Make the inner width of Mamba-1 mixers smaller.

        keep: Share of the channels, or with a score of the whole model, that stays.
        on: Which mixers.
        align: Widths are multiples of this where they were, and it is the step of the search.
        repair: With a score, refit what reads the channels that go.
        data: Rows that rank channels and refit readers; unless given, 32 that the model writes.
        score: What decides which modules lose more; without it all lose alike.
        search: With a score: try what may be best, or everything.
        """
    @staticmethod
    def heads(*, keep: str | Value, on: str | Value | None = ..., step: int | Value = ..., data: str | Value | None = ..., score: str | Value | None = ..., search: Literal['racing', 'exact'] | Value = ...) -> Value:
        """Remove heads of Mamba-2 scans.

        keep: Share of the heads, or with a score of the whole model, that stays.
        on: Which mixers.
        step: Heads of every group per cut.
        data: Rows that heads are ranked on; unless given, 32 that the model writes.
        score: What decides which modules lose more; without it all lose alike.
        search: With a score: try what may be best, or everything.
        """
    @staticmethod
    def multi(*, remove: int | str | Value, score: str | Value = ..., order: Sequence[Literal['blocks', 'scans', 'channels', 'heads', 'experts', 'scan_heads', 'scan_channels', 'states']] | Value = ..., split: dict[str, float] | Value | None = ..., group: int | Value = ..., heads: int | Value = ..., experts: int | Value = ..., states: int | Value = ..., on: str | Value | None = ..., search: Literal['racing', 'exact'] | Value = ..., rank: Literal['ratio', 'loss'] | Value | None = ..., estimate: Literal['none', 'taylor'] | Value = ..., together: int | Value = ..., repair: bool | Value | None = ..., data: str | Value | None = ..., overshoot: bool | Value = ..., clock: str | Value = ...) -> Value:
        """Shed blocks, scans, channels, heads and states of a hybrid, whatever the model misses least.

        remove: Share of the parameters, their bytes, the operations per token or the latency that goes; a number counts cuts.
        score: What the model is scored by without each candidate.
        order: The kinds that may be cut, and with `split` whose turn comes when.
        split: How what goes is split between kinds that take turns; without it they compete.
        group: Channels per cut, of MLPs and of Mamba-1 mixers.
        heads: KV heads, or heads of every group of a scan, per cut.
        experts: Experts of a layer per cut; as many stay as are chosen for a token.
        states: States of every group of a scan per cut.
        on: Which blocks may be cut, whole or inside.
        search: Score what may win, or everything.
        rank: By loss per unit saved, or by plain loss; cuts are counted by plain loss.
        estimate: What a racing search knows of candidates before it scores them: `taylor` leaves out those that gradients show to lose.
        together: Cuts of different layers that a racing search makes at once.
        repair: Refit what reads the items that go; no in an exact search, else yes.
        data: Rows that items are ranked and readers refitted on, several thousand tokens, not the score's; unless given, 32 that the model itself writes.
        overshoot: Whether more than half of the goal may go beyond it, where no part that is left is smaller; an exact search does that as published.
        clock: Which latency, measured on the machine that compiles.
        """
    @staticmethod
    def ssm(*, remove: int | str | Value, score: str | Value = ..., on: str | Value | None = ..., search: Literal['racing', 'exact'] | Value = ...) -> Value:
        """Remove the scans of state-space mixers, and all that only they need.

        remove: How many scans to remove, or what share of them or of the whole model.
        score: What the model is scored by without each candidate.
        on: Which mixers may lose their scan.
        search: Score what may be missed least, or everything.
        """
    @staticmethod
    def state(*, keep: str | Value, on: str | Value | None = ..., step: int | Value = ..., score: str | Value | None = ..., search: Literal['racing', 'exact'] | Value = ...) -> Value:
        """Let the scans of state-space mixers keep fewer states.

        keep: Share of the states, or with a score of the whole model, that stays.
        on: Which mixers.
        step: States of every group per cut.
        score: What decides which modules lose more; without it all lose alike.
        search: With a score: try what may be best, or everything.
        """

class sparsify:
    @staticmethod
    def admm(*, data: str | Value = ..., sparsity: str | Value, damping: float | Value = ..., allocation: Literal['uniform', 'owl', 'searched'] | Value = ..., on: str | Value | None = ..., pattern: Literal['any', '2:4', '4:8'] | Value = ...) -> Value:
        """Make weights of linear modules zero while all others move to keep the outputs.

        data: Rows whose inputs of the modules count; more tokens than a module has inputs.
        sparsity: Share of every output's weights that become zero.
        damping: What is added to the inputs' squares, as a share of each.
        allocation: How zeros spread over the layers: alike, by outliers, or by what they cost there.
        on: Linear modules; all inside the layers where it is left out.
        pattern: Any weights, or two of every four or four of every eight inputs of an output.
        """
    @staticmethod
    def magnitude(*, sparsity: str | Value, each: Literal['module', 'row'] | Value = ..., on: str | Value | None = ..., pattern: Literal['any', '2:4', '4:8', 'blocks'] | Value = ...) -> Value:
        """Make the smallest weights of linear modules zero.

        sparsity: Share of a module's weights that become zero.
        each: What loses that share: modules, or every output.
        on: Linear modules; all inside the layers where it is left out.
        pattern: Any weights; two of every four or four of every eight inputs of an output; or blocks of 16 outputs by 2 inputs, which run faster from 80% on.
        """
    @staticmethod
    def sparsegpt(*, data: str | Value = ..., sparsity: str | Value, damping: float | Value = ..., allocation: Literal['uniform', 'owl', 'searched'] | Value = ..., on: str | Value | None = ..., pattern: Literal['any', '2:4', '4:8'] | Value = ...) -> Value:
        """Make weights of linear modules zero, and let the weights behind each make up for it.

        data: Rows whose inputs of the modules count; more tokens than a module has inputs.
        sparsity: Share of the weights that become zero.
        damping: What is added to the inputs' squares, as a share of their mean.
        allocation: How zeros spread over the layers: alike, by outliers, or by what they cost there.
        on: Linear modules; all inside the layers where it is left out.
        pattern: Any weights, or two of every four or four of every eight inputs of an output.
        """
    @staticmethod
    def wanda(*, data: str | Value = ..., sparsity: str | Value, allocation: Literal['uniform', 'owl', 'searched'] | Value = ..., on: str | Value | None = ..., pattern: Literal['any', '2:4', '4:8', 'blocks'] | Value = ...) -> Value:
        """Make those weights of linear modules zero that matter least for what the modules are given.

        data: Rows whose inputs of the modules count; some thousand tokens.
        sparsity: Share of every output's weights that become zero.
        allocation: How zeros spread over the layers: alike, by outliers, or by what they cost there.
        on: Linear modules; all inside the layers where it is left out.
        pattern: Any weights; two of every four or four of every eight inputs of an output; or blocks of 16 outputs by 2 inputs, which run faster from 80% on.
        """

class supernet:
    @staticmethod
    def elastic(*, data: str | Value = ..., channels: Sequence[str] | Value = ..., heads: Sequence[str] | Value = ..., scan_heads: Sequence[str] | Value = ..., scan_channels: Sequence[str] | Value = ..., states: Sequence[str] | Value = ..., experts: Sequence[str] | Value = ..., kernels: Sequence[int] | Value = ..., depth: Literal['none', 'layers', 'blocks'] | Value = ..., per: Literal['layer', 'model'] | Value = ..., align: int | Value = ..., on: str | Value | None = ..., reorder: Literal['l1', 'wanda', 'obs'] | Value = ..., adapt: int | Value = ..., train: Literal['adapters', 'weights'] | Value = ..., ranks: Sequence[int] | Value = ..., alpha: float | Value = ..., dropout: float | Value = ..., draws: int | Value = ..., sandwich: bool | Value = ..., distill: str | Value = ..., opening: str | Value = ..., steps: int | Value = ..., lr: float | Value = ..., batch: int | Value = ..., accumulate: int | Value = ..., warmup: str | Value = ..., schedule: Literal['cosine', 'linear', 'constant'] | Value = ..., clip: float | Value = ..., gradient_checkpointing: bool | Value = ..., held_out: str | Value | None = ..., every: int | Value = ..., patience: int | Value = ..., save: int | Value = ...) -> Value:
        """Make widths and depth of a model elastic, and train it so that every choice of them is a model.

        data: Rows to learn from.
        channels: Shares of an MLP's channels that may stay, from 100% down.
        heads: Shares of an attention's heads that may stay, from 100% down.
        scan_heads: Shares of the heads of a scan that may stay, from 100% down.
        scan_channels: Shares of the channels of a scan without heads that may stay, from 100% down.
        states: Shares of a scan's states that may stay, from 100% down.
        experts: Shares of a layer's experts that may stay, from 100% down.
        kernels: Sizes that larger kernels of convolutions may shrink to, the largest first.
        depth: What may be left out as a whole: nothing, layers, or residual branches.
        per: Whether each layer has widths of its own.
        align: Widths of MLPs are multiples of this.
        on: Which branches or layers may be smaller.
        reorder: Which items stay: by weights, by readers' weights times what is read, or by what others can't make up for.
        adapt: Rows that statistics of BatchNorm, the trust of routers, and `reorder` other than `l1` are measured over.
        train: What is trained.
        ranks: What the rank of a layer's adapters may be, the largest first.
        alpha: What the products are multiplied with, divided by the largest rank.
        dropout: Probability that an input of an adapter is dropped.
        draws: Choices that are drawn for a step.
        sandwich: Whether a step learns on the largest and the smallest choice, too.
        distill: Share of a smaller choice's loss that the largest makes up.
        opening: Share of the steps over which smaller values come in.
        steps: Updates of what is trained, at most.
        lr: Largest learning rate of AdamW.
        batch: Rows in a forward.
        accumulate: Batches whose gradients make one update.
        warmup: Share of the steps over which the learning rate rises.
        schedule: How the learning rate falls after that.
        clip: Largest norm of an update's gradient.
        gradient_checkpointing: Layers run again in the backward pass: less memory, a third more time.
        held_out: Rows to judge the middle choice by; never learned from.
        every: Steps between two looks at `held_out`.
        patience: Looks without a gain after which the run ends.
        save: Steps between two checkpoints, from which a killed run goes on.
        """
    @staticmethod
    def lora(*, ranks: Sequence[int] | Value, data: str | Value = ..., per: Literal['layer', 'module', 'kind'] | Value = ..., on: str | Value | None = ..., alpha: float | Value = ..., dropout: float | Value = ..., zeros: Literal['keep', 'fill'] | Value = ..., bits: int | Value = ..., group: int | Value = ..., zero: Literal['free', 'middle'] | Value = ..., steps: int | Value = ..., lr: float | Value = ..., batch: int | Value = ..., accumulate: int | Value = ..., warmup: str | Value = ..., schedule: Literal['cosine', 'linear', 'constant'] | Value = ..., clip: float | Value = ..., gradient_checkpointing: bool | Value = ..., held_out: str | Value | None = ..., every: int | Value = ..., patience: int | Value = ..., save: int | Value = ...) -> Value:
        """Train adapters of elastic rank: any choice of ranks is then an adapter, without more training.

        ranks: What a site's rank may be, the largest first.
        data: Rows to learn from.
        per: What has a rank of its own: layers, modules, or all modules of one name.
        on: Linear modules that get an adapter; all inside the layers where it is left out.
        alpha: What the products are multiplied with, divided by the largest rank.
        dropout: Probability that an input of an adapter is dropped.
        zeros: Whether adapters give nothing where a sparse weight is zero.
        bits: Bits of the grid that is trained through; 0 for none.
        group: Inputs of an output that share a scale of the grid; 0 for all.
        zero: Whether 0 is any code of the grid, or the middle one.
        steps: Updates, at most.
        lr: Largest learning rate of AdamW.
        batch: Rows in a forward.
        accumulate: Batches whose gradients make one update.
        warmup: Share of the steps over which the learning rate rises.
        schedule: How the learning rate falls after that.
        clip: Largest norm of an update's gradient.
        gradient_checkpointing: Layers run again in the backward pass: less memory, a third more time.
        held_out: Rows to judge by; never learned from.
        every: Steps between two looks at `held_out`.
        patience: Looks without a gain after which the run ends.
        save: Steps between two checkpoints, from which a killed run goes on.
        """
    @staticmethod
    def pick(*, ranks: Literal['largest', 'middle', 'smallest'] | Value = ..., merge: bool | Value = ...) -> Value:
        """Take one choice out of a family.

        ranks: The value that every dimension takes.
        merge: Add the adapters to the weights; false gives them apart, for the target `peft`.
        """

class targets:
    @staticmethod
    def family(path: str | Value, *, shard: str | Value = ...) -> Value:
        """A front of choices that share their weights: written once, with the list of points.

        path: Folder or file of the artifact, relative to the output folder.
        shard: Largest size of one weights file.
        """
    @staticmethod
    def flower(path: str | Value, *, data: str | Sequence[str] | Value = ..., clients: int | Value = ..., rounds: int | Value = ..., strategy: Literal['fedavg', 'ffa', 'stack', 'svd', 'hetlora', 'abm', 'coverage', 'alone', 'search'] | Value = ..., trains: Literal['lora', 'reft', 'prompt', 'full', 'index'] | Value = ..., on: str | Value | None = ..., rank: int | Value = ..., ranks: Sequence[int] | Value | None = ..., alpha: float | Value = ..., tokens: int | Value = ..., top: int | Value = ..., mix: str | Value = ..., mixing: Literal['fixed', 'adaptive'] | Value = ..., center: Literal['mean', 'median'] | Value = ..., way: Literal['project', 'align', 'function'] | Value = ..., split: Literal['even', 'blocks', 'dirichlet', 'distinct'] | Value = ..., beta: float | Value = ..., hold: str | Value = ..., share: str | Value = ..., steps: int | Value = ..., batch: int | Value = ..., lr: float | Value = ..., deadline: str | Value = ..., budgets: Sequence[int] | Sequence[str] | Value | None = ..., counts: Literal['params', 'flops'] | Value = ..., allocation: Literal['budgets', 'sandwich'] | Value = ..., counted: Literal['all', 'holders'] | Value = ..., secure: bool | Value = ..., protects: Literal['clients', 'rows'] | Value = ..., stream: bool | Value = ..., anchor: float | Value = ..., examples: int | Value | None = ..., clip: float | Value = ..., noise: float | Value = ..., delta: float | Value = ...) -> Value:
        """A Flower App: clients that keep their data train adapters of the model together.

        data: Rows that clients learn from: one data set, or several.
        path: Folder or file of the artifact, relative to the output folder.
        clients: How many.
        rounds: How often states are sent and put together.
        strategy: How states are put together.
        trains: Adapters, interventions, embeddings in front of every row, all weights, or nothing but an index.
        on: Linear modules with adapters; all inside the layers where it is left out.
        rank: Rank of the adapters.
        ranks: Ranks of the clients' adapters, one for each, where they differ.
        alpha: What an adapter's product is multiplied with, divided by its rank.
        tokens: Embeddings of a soft prompt.
        top: Of `search`: how many documents answer a question.
        mix: Of `abm`: share of the others that a client takes in.
        mixing: Of `abm`: `mix` for all, or for each client what its own held-back rows like best.
        center: Of `abm`: mean or geometric median of the others.
        way: Of `abm`, where interventions are trained: how R stays orthonormal.
        split: Whose rows are whose: dealt out, cut into blocks, drawn, or a data set for each client.
        beta: Of `split: dirichlet`: the smaller, the more clients differ.
        hold: Share of its rows that a client judges itself by and does not learn from.
        share: Share of the clients that take part in a round.
        steps: Updates that a client makes in a round.
        batch: Rows of an update.
        lr: Learning rate of AdamW.
        deadline: How long a round may take.
        budgets: Of `coverage`: what each client affords: a share or a number of the parameters, `64MiB` while it trains, or `30ms` an update on this machine.
        counts: What shares and numbers in `budgets` are of: parameters, or operations of a token.
        allocation: Of `coverage`: each client trains what its budget allows, or sizes are drawn anew each round.
        counted: Of `coverage`: what a client changes counts among all clients, or among those that hold it.
        secure: The server is given sums of masked states, and no state.
        protects: Whom `clip` and `noise` hide.
        stream: Data sets are tasks that come one after another: each has its rounds.
        anchor: Of `stream`: how strongly training is pulled back to what the task began with; 0 not at all.
        examples: Rows that a client counts with at most, whatever it says; those of the largest part dealt unless given.
        clip: Largest norm of a client's change, or of a row's gradient; 0 for no bound.
        noise: Deviation of the noise, in units of `clip`.
        delta: For which epsilon is told.
        """
    @staticmethod
    def front(path: str | Value, *, shard: str | Value = ...) -> Value:
        """A front of models in one artifact, from which `effc pick` takes one.

        path: Folder or file of the artifact, relative to the output folder.
        shard: Largest size of one weights file.
        """
    @staticmethod
    def gguf(path: str | Value, *, type: Literal['f32', 'f16', 'bf16', 'q8_0', 'q4_0', 'q4_1', 'q2_k', 'q3_k', 'q4_k', 'q5_k', 'q6_k', 'iq1_s', 'iq1_m', 'iq2_xxs', 'iq2_xs', 'iq2_s', 'iq3_xxs', 'iq3_s', 'iq4_nl', 'iq4_xs'] | Value = ..., data: str | Value | None = ...) -> Value:
        """A GGUF file, as llama.cpp and what is built on it read models.

        path: Folder or file of the artifact, relative to the output folder.
        type: Numbers of matrices; `q8_0` has 8 bits and a scale for each 32 of a row, `q4_0` and `q4_1` the codes that `quantize.*` left in groups of 32, and q8_0 where it left none; the others are rounded by llama.cpp.
        data: Rows over which llama.cpp's importance matrix is taken, where it rounds: mean squares of what each column of a matrix is multiplied with. Types of about two bits and `iq3_xxs` need it.
        """
    @staticmethod
    def hf(path: str | Value, *, form: Literal['auto', 'stock', 'compact', 'compat', 'both'] | Value = ..., format: Literal['dense', 'compressed'] | Value = ..., shard: str | Value = ...) -> Value:
        """Checkpoint folders that transformers or `effc.load` read.

        path: Folder or file of the artifact, relative to the output folder.
        form: Which folders; `auto` is stock where shapes allow it, else compact and, where it can be, compat.
        format: Weights that `quantize.*` left on a grid: in the model's type, or their codes as `pack-quantized` of compressed-tensors.
        shard: Largest size of one weights file.
        """
    @staticmethod
    def native(path: str | Value, *, weights: Literal['bf16', 'int8', 'int4'] | Value = ..., inputs: Literal['int8', 'int16'] | Value = ..., group: int | Value = ..., head: Literal['auto', 'bf16', 'int8', 'int4'] | Value = ..., kv_cache: Literal['bf16', 'int8'] | Value = ...) -> Value:
        """Artifact of the native engine: packed weights and a plan of the decode step, for CPUs.

        path: Folder or file of the artifact, relative to the output folder.
        weights: Numbers of linear layers that are not lowered: bfloat16, int8 with a scale for each output, or int4 with one for each group of inputs.
        inputs: What int8 weights meet: inputs rounded token by token to 8 bits, or with the largest, one in 96, in 16 bits. That loses far less, decodes as fast and takes 1.1 to 1.2 times as long over prompts.
        group: Inputs that share a scale on int4: 32, 64 or 128. A weight that `quantize` left on a grid keeps its own.
        head: Numbers of the layer that makes the logits, and of an embedding that shares them; `auto` is int8 where `weights` are int4.
        kv_cache: Numbers of cached keys and values: int8 holds nearly twice the context in equal memory.
        """
    @staticmethod
    def onnx(path: str | Value, *, weights: Literal['dense', 'nbits'] | Value = ..., dynamic: Literal['none', 'int8'] | Value = ...) -> Value:
        """ONNX for ONNX Runtime: decoders with keys and values as inputs and outputs, anything else as it is.

        path: Folder or file of the artifact, relative to the output folder.
        weights: Weights that `quantize.*` left on a grid: in float32, or their codes as `MatMulNBits` of ONNX Runtime.
        dynamic: `int8` keeps weights of matrix products in int8 and rounds what they multiply as it comes; codes of `weights: nbits` stay, and meet inputs that are rounded so. The graph is compared before it is rounded; what int8 loses is reported, and judged by bounds.
        """
    @staticmethod
    def peft(path: str | Value, *, shard: str | Value = ...) -> Value:
        """Adapters as peft writes them, beside the model that they were trained on.

        path: Folder or file of the artifact, relative to the output folder.
        shard: Largest size of one weights file of the base.
        """
    @staticmethod
    def pruning_config(path: str | Value) -> Value:
        """Description of the pruned parts, in MultiPruner's published format.

        path: Folder or file of the artifact, relative to the output folder.
        """
    @staticmethod
    def pt2(path: str | Value, *, context: int | Value | None = ...) -> Value:
        """A program of torch alone, which reads neither effc nor transformers.

        path: Folder or file of the artifact, relative to the output folder.
        context: Tokens that keys and values of a program which continues text have places for; without it none is written.
        """
    @staticmethod
    def reft(path: str | Value, *, base: Literal['auto', 'inside'] | Value = ...) -> Value:
        """Interventions as a folder of their own, beside the model that they were trained in.

        path: Folder or file of the artifact, relative to the output folder.
        base: Whether the model beneath is copied: where it must be, or always.
        """
    @staticmethod
    def report(path: str | Value) -> Value:
        """One HTML page of what a pipeline gave, to look at and to pass on.

        path: Folder or file of the artifact, relative to the output folder.
        """
    @staticmethod
    def rttc(path: str | Value, *, knowledge: str | Value, policy: Literal['sequential', 'best', 'router', 'direct', 'rag', 'ttt'] | Value = ..., dev: str | Value = ..., check: Literal['exact', 'number', 'choice', 'pattern'] | Value = ..., options: Sequence[str] | Value = ..., embed: str | Value = ..., reward: str | Value = ..., graded: str | Value = ..., scorer: Literal['head', 'lora', 'reft'] | Value = ..., adapt: Literal['lora', 'reft', 'none'] | Value = ..., rank: int | Value = ..., epochs: int | Value = ..., lr: float | Value = ..., batch: int | Value = ..., learn: Literal['samples', 'answers'] | Value = ..., seconds: float | Value = ..., count: int | Value = ..., shown: int | Value = ..., selection: Literal['diverse', 'nearest'] | Value = ..., generation: Literal['auto', 'native', 'torch'] | Value = ..., evict: Literal['lfu', 'lru'] | Value = ..., lists: str | Value = ..., states: str | Value = ..., price: float | Value | None = ..., length: int | Value = ..., force: bool | Value = ...) -> Value:
        """A client and a server that answer with test-time compute, guided by a reward.

        knowledge: Samples: JSON lines with `question` and `answer`, or `text`; or a text, by paragraphs.
        path: Folder or file of the artifact, relative to the output folder.
        policy: Stop at the first answer that is good enough, make all three and take the best, predict one branch before anything is generated, or always the same branch.
        dev: Questions with answers, JSON lines, that thresholds are calibrated on.
        check: How an answer to a dev question is compared with the right one.
        options: The words that a `choice` chooses from.
        embed: Folder of a sentence encoder (MiniLM and its kin); `own` uses the model's own states.
        reward: `self` is the model's likelihood, `scorer` is trained from `graded`, else a folder with a classifier of one logit.
        graded: Answers with `question`, `answer` and `right`, JSON lines, to train a scorer on.
        scorer: What of a `scorer` is trained: a linear head over the vectors of question and answer, or adapters on the encoder too, which then reads both together.
        adapt: What is trained while answering: low-rank adapters, interventions at every position (cached states are a tenth as large), or nothing.
        rank: Of the adapters.
        epochs: Times that the samples of a query are gone over.
        lr: Learning rate of AdamW.
        batch: Samples of a step of training.
        learn: What is learned: whole samples, or their answers alone, given the questions.
        seconds: After which no step of a query's training is begun.
        count: Samples for a query.
        shown: Of them in the prompt of a `rag` answer, at most.
        selection: How samples are chosen.
        generation: What generates: the native engine, PyTorch, or the engine where the model allows it. Training is PyTorch's.
        evict: What leaves a full cache: what hit least often, the oldest of equals, or what did not hit for longest.
        lists: That cached lists of samples may take.
        states: That cached adapters may take.
        price: Accuracy that a second is worth, for the calibration. Unless given, thresholds ask for accuracy alone, and a router takes no longer than the better of always `rag` and always `ttt`.
        length: Most tokens of an answer in the calibration.
        force: Take a reward that tells right from wrong no better than a coin.
        """

class tune:
    @staticmethod
    def heal(*, data: str | Value = ..., learn: Literal['all', 'responses'] | Value = ..., method: Literal['lora', 'full'] | Value = ..., merge: bool | Value = ..., on: str | Value | None = ..., rank: int | Value = ..., alpha: float | Value = ..., dropout: float | Value = ..., zeros: Literal['keep', 'fill'] | Value = ..., distill: str | Value = ..., temperature: float | Value = ..., weight_decay: float | Value = ..., steps: int | Value = ..., lr: float | Value = ..., batch: int | Value = ..., accumulate: int | Value = ..., warmup: str | Value = ..., schedule: Literal['cosine', 'linear', 'constant'] | Value = ..., clip: float | Value = ..., gradient_checkpointing: bool | Value = ..., held_out: str | Value | None = ..., every: int | Value = ..., patience: int | Value = ..., save: int | Value = ...) -> Value:
        """Train a pruned model to win back quality that pruning cost.

        data: Rows to learn from.
        learn: Every token, of `pairs` the answers; or what assistants say.
        method: Train adapters and merge them, or the weights themselves.
        merge: Add the adapters to the weights; false gives them apart, for the target `peft`.
        on: Linear modules to train; all inside the layers, and with `full` all that the model has, where it is left out.
        rank: Rank of the adapters.
        alpha: What the adapters' product is multiplied with, divided by the rank.
        dropout: Probability that an input of an adapter is dropped.
        zeros: Whether zeros of sparse matrices stay zero.
        distill: Share of the loss that the original's predictions make up.
        temperature: What both predictions are softened by before they are compared.
        weight_decay: AdamW's decay of what is trained.
        steps: Updates, at most.
        lr: Largest learning rate of AdamW.
        batch: Rows in a forward.
        accumulate: Batches whose gradients make one update.
        warmup: Share of the steps over which the learning rate rises.
        schedule: How the learning rate falls after that.
        clip: Largest norm of an update's gradient.
        gradient_checkpointing: Layers run again in the backward pass: less memory, a third more time.
        held_out: Rows to judge by; never learned from.
        every: Steps between two looks at `held_out`.
        patience: Looks without a gain after which the run ends.
        save: Steps between two checkpoints, from which a killed run goes on.
        """
    @staticmethod
    def reft(*, data: str | Value = ..., weight_decay: float | Value = ..., subspace: Sequence[int] | Value | None = ..., steps: int | Value = ..., lr: float | Value = ..., batch: int | Value = ..., accumulate: int | Value = ..., warmup: str | Value = ..., schedule: Literal['linear', 'cosine', 'constant'] | Value = ..., clip: float | Value = ..., gradient_checkpointing: bool | Value = ..., held_out: str | Value | None = ..., every: int | Value = ..., patience: int | Value = ..., save: int | Value = ...) -> Value:
        """Train the interventions of a model while all its own weights stay.

        data: Prompts with answers to learn from.
        weight_decay: AdamW's decay of the interventions.
        subspace: Coordinates to train, from 0; all where it is left out.
        steps: Updates, at most.
        lr: Largest learning rate of AdamW.
        batch: Rows in a forward.
        accumulate: Batches whose gradients make one update.
        warmup: Share of the steps over which the learning rate rises.
        schedule: How the learning rate falls after that.
        clip: Largest norm of an update's gradient.
        gradient_checkpointing: Layers run again in the backward pass: less memory, a third more time.
        held_out: Prompts with answers to judge by; never learned from.
        every: Steps between two looks at `held_out`.
        patience: Looks without a gain after which the run ends.
        save: Steps between two checkpoints, from which a killed run goes on.
        """
