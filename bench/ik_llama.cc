// What `decoders.py` asks of ik_llama.cpp, as functions whose arguments do not change with its headers:
//     c++ -O2 -shared -fPIC -I SOURCE/include -I SOURCE/ggml/include bench/ik_llama.cc -o libik.so
//         -L BUILD/src -L BUILD/ggml/src -lllama -lggml -Wl,-rpath,BUILD/src:BUILD/ggml/src
#include <cstdint>

#include "llama.h"

extern "C" {

// A context over `file` with room for `room` tokens, null where there is none; `repack` lays weights out by rows as they
// are loaded (its option -rtr). Its defaults decide about the rest.
llama_context *ik_open(const char *file, int threads, int room, int repack) {
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    llama_model_params model = llama_model_default_params();
    model.repack_tensors = repack;
    model.use_mmap = !repack;
    llama_model *opened = llama_model_load_from_file(file, model);
    if (!opened) return nullptr;
    llama_context_params options = llama_context_default_params();
    options.n_ctx = options.n_batch = room;
    options.n_threads = options.n_threads_batch = threads;
    return llama_init_from_model(opened, options);
}

int ik_words(llama_context *context) { return llama_n_vocab(llama_get_model(context)); }

// Forget what stands at `length` and after it.
void ik_forget(llama_context *context, int length) {
    if (length)
        llama_kv_cache_seq_rm(context, 0, length, -1);
    else
        llama_kv_cache_clear(context);
}

// Read `count` tokens from place `length` on; logits of the last, or of all where `all`. Zero where it went well.
int ik_feed(llama_context *context, const int32_t *tokens, int count, int length, int all) {
    llama_batch batch = llama_batch_init(count, 0, 1);
    batch.n_tokens = count;
    for (int i = 0; i < count; i++) {
        batch.token[i] = tokens[i];
        batch.pos[i] = length + i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = all || i + 1 == count;
    }
    int status = llama_decode(context, batch);
    llama_batch_free(batch);
    return status;
}

const float *ik_logits(llama_context *context, int place) { return llama_get_logits_ith(context, place); }
}
