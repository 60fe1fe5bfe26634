// Times decode steps of a model through libllama; decode_vs_llama_cpp.py builds and starts it.
//
// llama_cpp_steps FILE THREADS CONTEXT
//
// Fills the cache with CONTEXT positions. Each number on stdin asks for that many steps, one new token at the same context
// each time; the answer is a line with their seconds.
#include <llama.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <chrono>
#include <vector>

static void fail(const char *what) {
    fprintf(stderr, "%s\n", what);
    exit(1);
}

int main(int count, char **arguments) {
    if (count != 4) fail("usage: llama_cpp_steps FILE THREADS CONTEXT");
    const int threads = atoi(arguments[2]), context_length = atoi(arguments[3]);
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    llama_model *model = llama_model_load_from_file(arguments[1], llama_model_default_params());
    if (!model) fail("the model cannot be loaded");
    llama_context_params parameters = llama_context_default_params();
    parameters.n_ctx = static_cast<uint32_t>(context_length + 256);
    parameters.n_batch = parameters.n_ctx;
    parameters.n_threads = parameters.n_threads_batch = threads;
    llama_context *context = llama_init_from_model(model, parameters);
    if (!context) fail("no context");
    std::vector<llama_token> prompt(static_cast<size_t>(context_length), 1);
    if (llama_decode(context, llama_batch_get_one(prompt.data(), context_length))) fail("the prompt failed");
    const int words = llama_vocab_n_tokens(llama_model_get_vocab(model));
    int steps;
    while (scanf("%d", &steps) == 1) {
        for (int i = 0; i < steps; i++) {
            llama_token token = 1;
            const auto start = std::chrono::steady_clock::now();
            if (llama_decode(context, llama_batch_get_one(&token, 1))) fail("a step failed");
            const float *logits = llama_get_logits_ith(context, -1);
            const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
            for (int w = 0; w < words; w += 997)
                if (!isfinite(logits[w])) fail("logits are not finite");
            llama_memory_seq_rm(llama_get_memory(context), 0, context_length, -1);
            printf("%.9f%c", taken.count(), i + 1 == steps ? '\n' : ' ');
        }
        fflush(stdout);
    }
    return 0;
}
