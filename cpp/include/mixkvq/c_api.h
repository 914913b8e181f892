/* The page format and attention over it as plain C, on buffers of the caller: for other languages and for tests.
 * docs/format.md is the specification. No call allocates, throws or aborts, and any number of threads may call at once.
 *
 * Between the two cdef marks stand declarations only, so that Python's cffi can read them as they are. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

/* cdef begin */

/* What every call that can fail returns. mixkvq_last_error() says the rest. */
enum {
    MIXKVQ_OK             = 0,
    MIXKVQ_ERROR_FORMAT   = -1, /* a format that this version does not serve */
    MIXKVQ_ERROR_ARGUMENT = -2, /* a null or unaligned pointer, a bad count, rows or importance that are not finite */
    MIXKVQ_ERROR_RECORD   = -3, /* a key record that no pack call has written */
    MIXKVQ_ERROR_ISA      = -4  /* the environment variable MIXKVQ_ISA names an instruction set that cannot be had */
};

typedef struct mixkvq_key_format {
    int32_t head_size;           /* a multiple of 8 from 32 to 256 */
    int32_t n16, n8, n4, n3, n2; /* channels per tier, each a multiple of 4, together head_size */
    int32_t group;               /* tokens per scale: 32, 64 or 128 */
} mixkvq_key_format;

typedef struct mixkvq_value_format {
    int32_t head_size; /* a multiple of 8 from 32 to 256 */
    int32_t bits;      /* 2, 3, 4 or 8 */
    int32_t group;     /* 0: rotated; 32 or 64: dimensions per scale */
} mixkvq_value_format;

const char * mixkvq_version(void);
int          mixkvq_format_version(void);
const char * mixkvq_isa(void); /* the instruction set in use; NULL: see mixkvq_last_error() */

/* What the last failed call of this thread said, one sentence; "" before the first. It stays until the next failure. */
const char * mixkvq_last_error(void);

/* Bytes of a record, a multiple of 64; 0 if the format is not one that this version serves. */
size_t mixkvq_key_record_bytes(const mixkvq_key_format * format);
size_t mixkvq_value_record_bytes(const mixkvq_value_format * format);

/* One head of a page. `rows` are 128 rows of F16 (IEEE binary16 bits), `stride` numbers apart; `valid` is 128 bytes, not 0 where the cell
 * holds a token, or NULL if all do; `importance` is head_size floats >= 0. `record` is aligned to 64 bytes. */
int mixkvq_pack_keys(const mixkvq_key_format * format, const uint16_t * rows, size_t stride, const uint8_t * valid,
                     const float * importance, uint8_t * record);
int mixkvq_unpack_keys(const mixkvq_key_format * format, const uint8_t * record, uint16_t * rows, size_t stride);
int mixkvq_pack_values(const mixkvq_value_format * format, const uint16_t * rows, size_t stride, const uint8_t * valid, uint8_t * record);
int mixkvq_unpack_values(const mixkvq_value_format * format, const uint8_t * record, uint16_t * rows, size_t stride);

/* Attention of n_queries queries [n_queries][D] over n_pages records of one head, which stand one behind the other:
 * softmax(softcap(q k * scale) + mask) v into out [n_queries][Dv]. softcap 0: none. `mask` is [n_queries][128 n_pages], -INFINITY hides a
 * cell, or NULL; `sink` is [n_queries] logits that take part in the softmax and have no value, or NULL. A query that sees nothing gets
 * zeros. Records and `scratch` are aligned to 64 bytes; scratch has mixkvq_attend_scratch_bytes() bytes (0 there: a bad argument). */
size_t mixkvq_attend_scratch_bytes(const mixkvq_key_format * key_format, const mixkvq_value_format * value_format, int32_t n_pages,
                                   int32_t n_queries);
int    mixkvq_attend(const mixkvq_key_format * key_format, const mixkvq_value_format * value_format, const uint8_t * key_records,
                     const uint8_t * value_records, int32_t n_pages, const float * q, int32_t n_queries, const float * mask, float scale,
                     float softcap, const float * sink, float * out, void * scratch);

/* cdef end */

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
#ifdef __cplusplus
}
#endif
