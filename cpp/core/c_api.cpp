#include "mixkvq/c_api.h"

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <string>

#include "mixkvq/attend.h"
#include "mixkvq/check.h"
#include "mixkvq/kernels.h"
#include "mixkvq/page.h"

using namespace mixkvq;

namespace {

thread_local char last_error[256] = "";

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
int fail(int code, const char * format, ...) {
    va_list args;
    va_start(args, format);
    std::vsnprintf(last_error, sizeof(last_error), format, args);
    va_end(args);
    return code;
}

// The kernels of this process. MIXKVQ_ISA is read once.
const Kernels * kernels() {
    static std::string           error;
    static const Kernels * const table = []() -> const Kernels * {
        const Isa isa = select_isa(error);
        return error.empty() ? kernels_for(isa) : nullptr;
    }();
    if (!table) fail(MIXKVQ_ERROR_ISA, "%s", error.c_str());
    return table;
}

// Each take_* or check_* returns MIXKVQ_OK or has called fail().
int take_format(const mixkvq_key_format * in, KeyFormat & f) {
    if (!in) return fail(MIXKVQ_ERROR_ARGUMENT, "the key format is null");
    f.head_size = in->head_size;
    f.n16 = in->n16;
    f.n8 = in->n8;
    f.n4 = in->n4;
    f.n3 = in->n3;
    f.n2 = in->n2;
    f.group = in->group;
    const char * error = f.error();
    return error ? fail(MIXKVQ_ERROR_FORMAT, "key format with head size %d: %s", f.head_size, error) : MIXKVQ_OK;
}

int take_format(const mixkvq_value_format * in, ValueFormat & f) {
    if (!in) return fail(MIXKVQ_ERROR_ARGUMENT, "the value format is null");
    f.head_size = in->head_size;
    f.bits = in->bits;
    f.group = in->group;
    const char * error = f.error();
    return error ? fail(MIXKVQ_ERROR_FORMAT, "value format with head size %d: %s", f.head_size, error) : MIXKVQ_OK;
}

int check_pointer(const void * p, const char * name) { return p ? MIXKVQ_OK : fail(MIXKVQ_ERROR_ARGUMENT, "%s is null", name); }

int check_aligned(const void * p, const char * name) {
    if (int code = check_pointer(p, name)) return code;
    const size_t off = reinterpret_cast<uintptr_t>(p) % kRecordAlign;
    return off == 0 ? MIXKVQ_OK : fail(MIXKVQ_ERROR_ARGUMENT, "%s is %zu bytes past a multiple of %d", name, off, kRecordAlign);
}

int check_rows(const uint16_t * rows, size_t stride, int head_size) {
    if (int code = check_pointer(rows, "rows")) return code;
    if (stride >= size_t(head_size)) return MIXKVQ_OK;
    return fail(MIXKVQ_ERROR_ARGUMENT, "the stride of rows is %zu, less than the head size %d", stride, head_size);
}

int check_finite(const uint16_t * rows, size_t stride, int head_size, const CellMask & valid) {
    int cell = 0, channel = 0;
    if (!find_non_finite(rows, head_size, stride, valid, cell, channel)) return MIXKVQ_OK;
    return fail(MIXKVQ_ERROR_ARGUMENT, "rows is not finite at cell %d, channel %d", cell, channel);
}

int check_record(const KeyFormat & f, const uint8_t * record, int index) {
    const int place = find_bad_channel(f, record);
    if (place < 0) return MIXKVQ_OK;
    return fail(MIXKVQ_ERROR_RECORD, "key record %d is damaged: place %d of its order holds channel %d, the head has %d", index, place,
                record[f.offset_order() + place], f.head_size);
}

int check_counts(int32_t n_pages, int32_t n_queries) {
    if (n_pages < 0) return fail(MIXKVQ_ERROR_ARGUMENT, "n_pages is %d", n_pages);
    if (n_queries < 0) return fail(MIXKVQ_ERROR_ARGUMENT, "n_queries is %d", n_queries);
    return MIXKVQ_OK;
}

CellMask take_valid(const uint8_t * valid) {
    if (!valid) return CellMask::all();
    CellMask mask;
    for (int t = 0; t < kPageCells; ++t) {
        if (valid[t]) mask.set(t);
    }
    return mask;
}

// The scratch of attend: the floats of the core, then the addresses of the records.
size_t scratch_float_bytes(const KeyFormat & k, const ValueFormat & v, int n) { return attend_scratch_floats(k, v, n) * sizeof(float); }

}  // namespace

const char * mixkvq_version(void) { return MIXKVQ_VERSION; }
int          mixkvq_format_version(void) { return kFormatVersion; }
const char * mixkvq_last_error(void) { return last_error; }

const char * mixkvq_isa(void) {
    const Kernels * table = kernels();
    return table ? isa_name(table->isa) : nullptr;
}

size_t mixkvq_key_record_bytes(const mixkvq_key_format * format) {
    KeyFormat f;
    return take_format(format, f) ? 0 : f.record_bytes();
}

size_t mixkvq_value_record_bytes(const mixkvq_value_format * format) {
    ValueFormat f;
    return take_format(format, f) ? 0 : f.record_bytes();
}

int mixkvq_pack_keys(const mixkvq_key_format * format, const uint16_t * rows, size_t stride, const uint8_t * valid, const float * importance,
                     uint8_t * record) {
    KeyFormat      f;
    const CellMask mask = take_valid(valid);
    if (int code = take_format(format, f)) return code;
    if (int code = check_rows(rows, stride, f.head_size)) return code;
    if (int code = check_pointer(importance, "importance")) return code;
    if (int code = check_aligned(record, "record")) return code;
    if (int code = check_finite(rows, stride, f.head_size, mask)) return code;
    const int bad = find_bad_importance(importance, f.head_size);
    if (bad >= 0) return fail(MIXKVQ_ERROR_ARGUMENT, "importance is %g at channel %d", double(importance[bad]), bad);
    const Kernels * table = kernels();
    if (!table) return MIXKVQ_ERROR_ISA;
    table->pack_keys(f, rows, stride, mask, importance, record);
    return MIXKVQ_OK;
}

int mixkvq_unpack_keys(const mixkvq_key_format * format, const uint8_t * record, uint16_t * rows, size_t stride) {
    KeyFormat f;
    if (int code = take_format(format, f)) return code;
    if (int code = check_aligned(record, "record")) return code;
    if (int code = check_rows(rows, stride, f.head_size)) return code;
    if (int code = check_record(f, record, 0)) return code;
    const Kernels * table = kernels();
    if (!table) return MIXKVQ_ERROR_ISA;
    table->unpack_keys(f, record, rows, stride);
    return MIXKVQ_OK;
}

int mixkvq_pack_values(const mixkvq_value_format * format, const uint16_t * rows, size_t stride, const uint8_t * valid, uint8_t * record) {
    ValueFormat    f;
    const CellMask mask = take_valid(valid);
    if (int code = take_format(format, f)) return code;
    if (int code = check_rows(rows, stride, f.head_size)) return code;
    if (int code = check_aligned(record, "record")) return code;
    if (int code = check_finite(rows, stride, f.head_size, mask)) return code;
    const Kernels * table = kernels();
    if (!table) return MIXKVQ_ERROR_ISA;
    table->pack_values(f, rows, stride, mask, record);
    return MIXKVQ_OK;
}

int mixkvq_unpack_values(const mixkvq_value_format * format, const uint8_t * record, uint16_t * rows, size_t stride) {
    ValueFormat f;
    if (int code = take_format(format, f)) return code;
    if (int code = check_aligned(record, "record")) return code;
    if (int code = check_rows(rows, stride, f.head_size)) return code;
    const Kernels * table = kernels();
    if (!table) return MIXKVQ_ERROR_ISA;
    table->unpack_values(f, record, rows, stride);
    return MIXKVQ_OK;
}

size_t mixkvq_attend_scratch_bytes(const mixkvq_key_format * key_format, const mixkvq_value_format * value_format, int32_t n_pages,
                                   int32_t n_queries) {
    KeyFormat   k;
    ValueFormat v;
    if (take_format(key_format, k) || take_format(value_format, v) || check_counts(n_pages, n_queries)) return 0;
    return scratch_float_bytes(k, v, n_queries) + size_t(n_pages) * 2 * sizeof(const uint8_t *);
}

int mixkvq_attend(const mixkvq_key_format * key_format, const mixkvq_value_format * value_format, const uint8_t * key_records,
                  const uint8_t * value_records, int32_t n_pages, const float * q, int32_t n_queries, const float * mask, float scale,
                  float softcap, const float * sink, float * out, void * scratch) {
    KeyFormat   k;
    ValueFormat v;
    if (int code = take_format(key_format, k)) return code;
    if (int code = take_format(value_format, v)) return code;
    if (int code = check_counts(n_pages, n_queries)) return code;
    if (int code = check_aligned(scratch, "scratch")) return code;
    if (n_pages > 0) {
        if (int code = check_aligned(key_records, "key_records")) return code;
        if (int code = check_aligned(value_records, "value_records")) return code;
    }
    if (n_queries > 0) {
        if (int code = check_pointer(q, "q")) return code;
        if (int code = check_pointer(out, "out")) return code;
    }
    if (!std::isfinite(scale)) return fail(MIXKVQ_ERROR_ARGUMENT, "scale is %g", double(scale));
    if (!(softcap >= 0) || std::isinf(softcap)) return fail(MIXKVQ_ERROR_ARGUMENT, "softcap is %g", double(softcap));
    const Kernels * table = kernels();
    if (!table) return MIXKVQ_ERROR_ISA;

    const uint8_t ** key_pages = reinterpret_cast<const uint8_t **>(static_cast<uint8_t *>(scratch) + scratch_float_bytes(k, v, n_queries));
    const uint8_t ** value_pages = key_pages + n_pages;
    for (int p = 0; p < n_pages; ++p) {
        key_pages[p] = key_records + p * k.record_bytes();
        value_pages[p] = value_records + p * v.record_bytes();
        if (int code = check_record(k, key_pages[p], p)) return code;
    }
    attend_records(*table, k, v, key_pages, value_pages, n_pages, q, n_queries, mask, SoftmaxParams{scale, softcap}, sink, out,
                   static_cast<float *>(scratch));
    return MIXKVQ_OK;
}
