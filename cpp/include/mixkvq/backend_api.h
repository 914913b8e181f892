/* How a program talks to the loaded ggml backend about its caches: settings in, statistics out, and a codec of its own. Plain C.
 * The pointer comes from ggml_backend_reg_get_proc_address(reg, "mixkvq_backend_api"). Strings that a call returns belong to the
 * backend and live until the next call in the same thread (layer names and reasons: as long as the context). */
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MIXKVQ_BACKEND_API_VERSION 4

/* A page that is about to leave the recent window: all heads of one layer's keys or values. */
typedef struct mixkvq_page {
    int32_t layer, is_value, stream, first_cell, n_heads, head_size;
    uint64_t valid[2];   /* cells that hold a token, bit i of word i / 64 */
    const float * rows;  /* [n_heads][128][head_size]; zeros where there is no token */
    const float * q_abs; /* keys: [n_heads][head_size], mean |q_d| of the queries so far, ones before the first; values: NULL */
    const float * q_sqr; /* keys: mean q_d^2, likewise; values: NULL */
} mixkvq_page;

/* Takes the place of packing, for experiments with other formats: given a page, writes what a format would read back into `rows` (zeros at
 * first, same shape) and the bits that it would take for the whole page into `bits`. The cache keeps the result in F16 (clamped to +-65504) and
 * does not hand the page over again until it is written to or shifted. Called in the thread that decodes, one page at a time, in the order of cells.
 * Another result than 0, a NaN in a cell that holds a token, or bits that are not positive: the decode fails, and session error() says why. */
typedef int (*mixkvq_codec)(void * user, const mixkvq_page * page, float * rows, double * bits);

/* What a context's cache should be. A zero is a value, not a default: start from
 * {NULL, NULL, -1, -1, 0, NULL, NULL, NULL, NULL, 0}. */
typedef struct mixkvq_settings {
    const char *    preset;      /* name or alias; NULL: the default preset */
    const char *    profile;     /* path of a profile (GGUF); overrides preset; NULL: none */
    int             window;      /* recent tokens kept in F16; -1: 128 (or the profile's) */
    int             sinks;       /* first tokens kept in F16, rounded up to pages; -1: 128 (or the profile's) */
    int             n_layers;    /* entries of the two arrays below, 0 if the head sizes are not known */
    const int32_t * head_size_k; /* per layer, 0 where a layer has no attention; sharpens the reservation */
    const int32_t * head_size_v;
    mixkvq_codec    codec;       /* in place of packing: preset and profile do not matter then; NULL: none */
    void *          codec_user;  /* handed to it; must live as long as the contexts */
    int             all_threads; /* not 0: also for contexts that threads without a session of their own create meanwhile; the latest such session counts */
} mixkvq_settings;

/* The caches of the contexts created between begin and end, in one thread or (all_threads) in others, too. */
typedef struct mixkvq_session mixkvq_session;

/* Three words. Filled: bytes in memory when all cells hold tokens. Reserved: bytes of addresses. In use: bytes of the cells written so far.
 * Of a context that llama.cpp only measures (no_alloc) they are what they would be, and nothing is in use. */
typedef struct mixkvq_stats {
    uint64_t bytes;          /* filled: records, F16 pages, plain tensors and page tables; not scratch, nor the buffers of one attention call */
    uint64_t bytes_peak;     /* filled, and the most scratch there ever was: the F16 pages of long prompts */
    uint64_t bytes_f16;      /* what an F16 cache of the same cells would take */
    uint64_t bytes_used;     /* in use: records and F16 pages that hold tokens; plain tensors as a whole */
    uint64_t elements;       /* key and value elements of all cells */
    double   body_bits;      /* mean over packed layers, per element of a record; with a codec by its own count, 0 before its first page */
    double   total_bits;     /* 8 * bytes / elements; with a codec: as if its pages took the bits it counts, though they are kept in F16 */
    int32_t  n_cells;        /* of the largest layer, all streams */
    int32_t  n_layers;       /* layers with a cache */
    int32_t  n_plain_layers; /* key and value tensors that are stored plainly */
    int32_t  n_threads;
    const char * isa;
    uint64_t bytes_reserved;  /* reserved: the buffers of keys and values, the scratch there is now, page tables */
    uint64_t bytes_recurrent; /* recurrent states, which are no keys and values: in none of the other figures */
    int32_t  n_cells_gain;    /* where packing saves nothing, the cells (a multiple of 256) from which on it would; else 0 */
} mixkvq_stats;

typedef struct mixkvq_layer_stats {
    const char * name;    /* of the cache tensor, "cache_k_l0" */
    const char * kind;    /* "packed", "codec", "plain" or "unused" (not read yet) */
    const char * reason;  /* why it is stored plainly, "" otherwise */
    int32_t  layer, is_value;
    int32_t  head_size, n_heads, n_cells, n_streams;
    int32_t  tiers[5];    /* packed keys: channels at 16, 8, 4, 3, 2 bits of head 0 */
    int32_t  value_bits;  /* packed values: code bits of head 0 */
    int32_t  group;       /* packed keys: tokens per scale; values: dimensions per scale, 0 rotated */
    int32_t  pages_packed, pages_f16; /* pages_packed: or rewritten by the codec */
    uint64_t pages_packed_ever; /* how many times a page was packed, or rewritten */
    uint64_t bytes;             /* filled, without tables */
    double   body_bits;         /* as above, of this layer's keys or values alone */
} mixkvq_layer_stats;

/* A packed state on its way out or in: what llama_state_get_data or llama_state_seq_get_data gives, with the records of the caches, their F16 pages and
 * query statistics in place of rows in F16. A program saves one by
 *     size = llama_state_get_size(ctx);              // or llama_state_seq_get_size_ext
 *     state = api->state_save(session, size, flags);
 *     n = llama_state_get_data(ctx, api->state_data(state, &size), size);   // or llama_state_seq_get_data_ext, in the same thread
 *     api->state_write(state, n, write, user, &bytes);
 *     api->state_free(state);
 * and loads one, into a context of the same model, settings, RoPE and adapters (which nothing here knows), by
 *     state = api->state_load(session, data, bytes, flags);
 *     n = llama_state_set_data(ctx, api->state_data(state, &size), size);   // or llama_state_seq_set_data_ext
 *     api->state_finish(state, n, &first);
 *     if (first >= 0) llama_memory_seq_rm(llama_get_memory(ctx), seq, first, -1);   // for each sequence
 *     api->state_free(state);
 * Of a session's contexts it is that of the calls. Logits are then the same bits as without it, if the cells come back to the places where they were,
 * which llama.cpp decides: those of a whole context do, and those of a sequence that had a stream to itself. Others keep the records of pages that are moved
 * as a whole. Loading needs no room in which rows in F16 would lie, nor does saving. */
typedef struct mixkvq_state mixkvq_state;

enum {
    MIXKVQ_STATE_SEQUENCE = 1, /* of one sequence, not of the whole context */
    MIXKVQ_STATE_SHARED   = 2  /* other sequences have cells in its stream: kv_unified, and more than one sequence */
};

/* Takes the next bytes of a state. Another result than 0 ends the call that writes them. */
typedef int (*mixkvq_write)(void * user, const void * data, size_t bytes);

typedef struct mixkvq_backend_api {
    int version;
    /* Checks the settings and makes them those of the contexts that this thread creates until `end`, which any thread may call. NULL: see error(). */
    mixkvq_session * (*begin)(const mixkvq_settings * settings);
    void (*end)(mixkvq_session * session);
    void (*release)(mixkvq_session * session); /* the caches live on; only the handle goes */
    /* The figures may be asked for while another thread decodes; the call then waits until that has come to a point where they are true.
     * 0, or -1, where error(NULL) says why: no cache was created under this session, or there is no tensor of this number. */
    int (*stats)(mixkvq_session * session, mixkvq_stats * out);
    int (*n_layers)(mixkvq_session * session);                  /* cache tensors, for layer_stats */
    int (*layer_stats)(mixkvq_session * session, int index, mixkvq_layer_stats * out);
    /* What a failed allocation or codec said ("" if nothing has failed since the last cache was created): of this session, or of the last call of this
     * thread when NULL. */
    const char * (*error)(mixkvq_session * session);
    /* Mean |q_d| and mean q_d^2 of the queries that read a layer's keys, the last few thousand of them: [n_heads][head_size] of layer_stats, each.
     * `index` is that of layer_stats. -1 if it is not keys that are packed or go to a codec, or no query has read them yet. */
    int (*query_statistics)(mixkvq_session * session, int index, float * mean_abs, float * mean_sqr);
    /* Why one of ggml's GPUs ("CUDA0") has no device of ours; "" if it has one or there is no such GPU. */
    const char * (*why_unused)(const char * device);
    /* Packed states, see above. Between begin and free the thread saves and loads nothing else. NULL or -1: error(NULL) says why.
     * state_load refuses what is damaged or does not fit, before anything is changed. `data` must stay until the state is freed. */
    mixkvq_state * (*state_save)(mixkvq_session * session, size_t size, int flags);
    mixkvq_state * (*state_load)(mixkvq_session * session, const void * data, size_t bytes, int flags);
    void * (*state_data)(mixkvq_state * state, size_t * size); /* llama.cpp's part: where it writes it, or what it is to read */
    /* What llama.cpp has written n bytes of. `bytes`: how many there are in all, if not NULL; without `write` they are only counted. Again if it is wanted. */
    int (*state_write)(mixkvq_state * state, size_t n, mixkvq_write write, void * user, uint64_t * bytes);
    /* n: what llama.cpp has read of it, 0 if it has refused it. first_position, if not -1 then: llama_memory_seq_rm(memory, seq, first_position, -1) has to
     * remove cells that hold nothing, for the sequence of the state, or each one of a whole context. They kept the others in their places. */
    int (*state_finish)(mixkvq_state * state, size_t n, int32_t * first_position);
    void (*state_free)(mixkvq_state * state);
} mixkvq_backend_api;

#ifdef __cplusplus
}
#endif
