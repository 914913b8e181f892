/* How a program talks to the loaded ggml backend about its caches: settings in, statistics out. Plain C.
 * The pointer comes from ggml_backend_reg_get_proc_address(reg, "mixkvq_backend_api"). Strings that a call returns belong to the
 * backend and live until the next call in the same thread (layer names and reasons: as long as the context). */
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MIXKVQ_BACKEND_API_VERSION 1

/* What a context's cache should be. A zero is a value, not a default: start from {NULL, NULL, -1, -1, 0, NULL, NULL}. */
typedef struct mixkvq_settings {
    const char *    preset;      /* name or alias; NULL: the default preset */
    const char *    profile;     /* path of a profile (GGUF); overrides preset; NULL: none */
    int             window;      /* recent tokens kept in F16; -1: 128 (or the profile's) */
    int             sinks;       /* first tokens kept in F16, rounded up to pages; -1: 128 (or the profile's) */
    int             n_layers;    /* entries of the two arrays below, 0 if the head sizes are not known */
    const int32_t * head_size_k; /* per layer, 0 where a layer has no attention; sharpens the reservation */
    const int32_t * head_size_v;
} mixkvq_settings;

/* The caches of the contexts created in one thread between begin and end. */
typedef struct mixkvq_session mixkvq_session;

typedef struct mixkvq_stats {
    uint64_t bytes;          /* allocated for the caches now: records, F16 pages, their scratch, tables, plain tensors; not the buffers of one attention call */
    uint64_t bytes_peak;     /* the most there ever was, with the scratch of long prompts */
    uint64_t bytes_f16;      /* what an F16 cache of the same cells would take */
    uint64_t bytes_used;     /* of the cells written so far: records in use and F16 pages in use */
    uint64_t elements;       /* key and value elements of all cells */
    double   body_bits;      /* mean over packed layers, per element of a record; 0 if no layer is packed */
    double   total_bits;     /* 8 * bytes / elements */
    int32_t  n_cells;        /* of the largest layer, all streams */
    int32_t  n_layers;       /* layers with a cache */
    int32_t  n_plain_layers; /* key and value tensors that are stored plainly */
    int32_t  n_threads;
    const char * isa;
} mixkvq_stats;

typedef struct mixkvq_layer_stats {
    const char * name;    /* of the cache tensor, "cache_k_l0" */
    const char * kind;    /* "packed", "plain" or "unused" (not read yet) */
    const char * reason;  /* why it is stored plainly, "" otherwise */
    int32_t  is_value;
    int32_t  head_size, n_heads, n_cells, n_streams;
    int32_t  tiers[5];    /* keys: channels at 16, 8, 4, 3, 2 bits of head 0 */
    int32_t  value_bits;  /* values: code bits of head 0 */
    int32_t  group;       /* keys: tokens per scale; values: dimensions per scale, 0 rotated */
    int32_t  pages_packed, pages_f16;
    uint64_t pages_packed_ever; /* how many times a page was packed */
    uint64_t bytes;
    double   body_bits;
} mixkvq_layer_stats;

typedef struct mixkvq_backend_api {
    int version;
    /* Checks the settings and makes them those of the contexts that this thread creates until `end`. NULL: see error(). */
    mixkvq_session * (*begin)(const mixkvq_settings * settings);
    void (*end)(mixkvq_session * session);
    void (*release)(mixkvq_session * session); /* the caches live on; only the handle goes */
    int (*stats)(mixkvq_session * session, mixkvq_stats * out); /* 0, or -1 if no cache was created under this session */
    int (*n_layers)(mixkvq_session * session);                  /* cache tensors, for layer_stats */
    int (*layer_stats)(mixkvq_session * session, int index, mixkvq_layer_stats * out);
    /* What a failed allocation said ("" if nothing failed): of this session, or of the last call when NULL. */
    const char * (*error)(mixkvq_session * session);
} mixkvq_backend_api;

#ifdef __cplusplus
}
#endif
