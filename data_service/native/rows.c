/* Rows of tokens: put in order, gathered from a shard, checked, and put in their slots, one call for thousands of them.
 *
 * The module `stormjib_rows`; `data_service.row_kernel` is its only caller and says what the arguments are. Every function
 * takes whole buffers, checks their sizes against each other before it touches them, and lets go of the interpreter's
 * lock while it works. Indices that leave a buffer are an IndexError; nothing is written past an end.
 *
 * A row's checksum is CRC-32C (Castagnoli; reflected polynomial 0x82f63b78, initial value and final inversion 0xffffffff,
 * as in RFC 3720, appendix B.4) over its length (uint32, little-endian), its tokens with their padding, the places of its
 * document starts (uint32 each), its answer bits and its class (int32), as far as it has them. Processors compute it
 * eight bytes at a time with three cycles' latency, so three rows are checked side by side.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "rows are little-endian on the wire, and this kernel is written for little-endian machines"
#endif

/* ------------------------------------------------------------------ CRC-32C */

static uint32_t crc_table[8][256];

static void make_table(void)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++)
            crc = (crc >> 1) ^ (crc & 1 ? 0x82f63b78u : 0);
        crc_table[0][byte] = crc;
    }
    for (uint32_t byte = 0; byte < 256; byte++)
        for (int slice = 1; slice < 8; slice++) {
            uint32_t before = crc_table[slice - 1][byte];
            crc_table[slice][byte] = (before >> 8) ^ crc_table[0][before & 255];
        }
}

/* `crc` is the register, not inverted: callers begin with ~0 and invert the end. */
static uint32_t crc_in_software(uint32_t crc, const uint8_t *data, size_t size)
{
    for (; size >= 8; size -= 8, data += 8) {
        uint64_t word;
        memcpy(&word, data, 8);
        word ^= crc;
        crc = crc_table[7][word & 255] ^ crc_table[6][(word >> 8) & 255] ^ crc_table[5][(word >> 16) & 255] ^
              crc_table[4][(word >> 24) & 255] ^ crc_table[3][(word >> 32) & 255] ^ crc_table[2][(word >> 40) & 255] ^
              crc_table[1][(word >> 48) & 255] ^ crc_table[0][word >> 56];
    }
    for (; size; size--, data++)
        crc = (crc >> 8) ^ crc_table[0][(crc ^ *data) & 255];
    return crc;
}

#if defined(SOFTWARE_ONLY)
/* As on a processor without the instruction: for tests. */
#elif defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <nmmintrin.h>
#define HARDWARE __attribute__((target("sse4.2")))
#define CRC_8_BYTES(crc, word) ((uint32_t)_mm_crc32_u64((crc), (word)))
#define CRC_1_BYTE(crc, byte) _mm_crc32_u8((crc), (byte))
static int has_hardware(void) { return __builtin_cpu_supports("sse4.2"); }
#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#define HARDWARE
#define CRC_8_BYTES(crc, word) __crc32cd((crc), (word))
#define CRC_1_BYTE(crc, byte) __crc32cb((crc), (byte))
static int has_hardware(void) { return 1; }
#endif

#ifdef HARDWARE
HARDWARE static uint32_t crc_in_hardware(uint32_t crc, const uint8_t *data, size_t size)
{
    for (; size >= 8; size -= 8, data += 8) {
        uint64_t word;
        memcpy(&word, data, 8);
        crc = CRC_8_BYTES(crc, word);
    }
    for (; size; size--, data++)
        crc = CRC_1_BYTE(crc, *data);
    return crc;
}

HARDWARE static void crc_of_three(uint32_t *crc, const uint8_t *const data[3], size_t size)
{
    const uint8_t *one = data[0], *two = data[1], *three = data[2];
    uint32_t first = crc[0], second = crc[1], third = crc[2];
    size_t left = size;
    for (; left >= 8; left -= 8, one += 8, two += 8, three += 8) {
        uint64_t words[3];
        memcpy(&words[0], one, 8);
        memcpy(&words[1], two, 8);
        memcpy(&words[2], three, 8);
        first = CRC_8_BYTES(first, words[0]);
        second = CRC_8_BYTES(second, words[1]);
        third = CRC_8_BYTES(third, words[2]);
    }
    for (; left; left--, one++, two++, three++) {
        first = CRC_1_BYTE(first, *one);
        second = CRC_1_BYTE(second, *two);
        third = CRC_1_BYTE(third, *three);
    }
    crc[0] = first;
    crc[1] = second;
    crc[2] = third;
}
#endif

/* Rows that are checked side by side. */
#define SIDE_BY_SIDE 3

static int in_hardware;

static uint32_t crc_of(uint32_t crc, const uint8_t *data, size_t size)
{
#ifdef HARDWARE
    if (in_hardware)
        return crc_in_hardware(crc, data, size);
#endif
    return crc_in_software(crc, data, size);
}

/* Registers of up to three rows, each behind its length and its tokens. */
static void begin_rows(uint32_t *crc, const uint8_t *const data[3], const uint32_t *lengths, int count, size_t size)
{
    for (int row = 0; row < count; row++)
        crc[row] = crc_of(0xffffffffu, (const uint8_t *)&lengths[row], 4);
#ifdef HARDWARE
    if (in_hardware && count == SIDE_BY_SIDE) {
        crc_of_three(crc, data, size);
        return;
    }
#endif
    for (int row = 0; row < count; row++)
        crc[row] = crc_of(crc[row], data[row], size);
}

/* ------------------------------------------------------------------ rows */

/* What follows the tokens in a row's checksum. */
typedef struct {
    const uint8_t *starts;
    Py_ssize_t num_starts;
    const int32_t *offsets;
    const uint8_t *bits; /* or NULL */
    size_t bits_size;
    const uint8_t *labels; /* or NULL */
} Rest;

static uint32_t end_row(uint32_t crc, const Rest *rest, Py_ssize_t row)
{
    int32_t begin = rest->offsets[row];
    crc = crc_of(crc, rest->starts + 4 * (size_t)begin, 4 * (size_t)(rest->offsets[row + 1] - begin));
    if (rest->bits)
        crc = crc_of(crc, rest->bits + rest->bits_size * (size_t)row, rest->bits_size);
    if (rest->labels)
        crc = crc_of(crc, rest->labels + 4 * (size_t)row, 4);
    return ~crc;
}

/* Asks for a row's bytes early: rows lie anywhere, so that the processor cannot guess the next one. */
static inline void ask_for(const uint8_t *data, size_t size)
{
#if defined(__GNUC__) || defined(__clang__)
    for (size_t at = 0; at < size; at += 64)
        __builtin_prefetch(data + at);
#endif
}

static int offsets_fit(const Rest *rest, Py_ssize_t count)
{
    if (rest->offsets[0] < 0 || rest->offsets[count] > rest->num_starts)
        return 0;
    for (Py_ssize_t row = 0; row < count; row++)
        if (rest->offsets[row + 1] < rest->offsets[row])
            return 0;
    return 1;
}

/* ------------------------------------------------------------------ buffers */

#define MAX_VIEWS 12

typedef struct {
    Py_buffer views[MAX_VIEWS];
    int count;
} Views;

/* The bytes of an argument; NULL with an error set where there are other than `size` (any number where that is < 0). */
static void *bytes_of(Views *held, PyObject *object, const char *name, Py_ssize_t size, int writable)
{
    static char empty[8];
    Py_buffer *view = &held->views[held->count];
    if (PyObject_GetBuffer(object, view, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE))
        return NULL;
    held->count++;
    if (size >= 0 && view->len != size) {
        PyErr_Format(PyExc_ValueError, "%s has %zd bytes, not %zd", name, view->len, size);
        return NULL;
    }
    return view->buf ? view->buf : empty;
}

static Py_ssize_t size_of_last(const Views *held)
{
    return held->views[held->count - 1].len;
}

static PyObject *done(Views *held, PyObject *result)
{
    while (held->count)
        PyBuffer_Release(&held->views[--held->count]);
    return result;
}

static int rest_of(Views *held, Rest *rest, PyObject *starts, PyObject *offsets, PyObject *bits, PyObject *labels,
                   Py_ssize_t count)
{
    memset(rest, 0, sizeof *rest);
    if (!(rest->starts = bytes_of(held, starts, "starts", -1, 0)))
        return 0;
    rest->num_starts = size_of_last(held) / 4;
    if (!(rest->offsets = bytes_of(held, offsets, "offsets", 4 * (count + 1), 0)))
        return 0;
    if (bits != Py_None) {
        if (!(rest->bits = bytes_of(held, bits, "answer_bits", -1, 0)))
            return 0;
        rest->bits_size = count ? (size_t)(size_of_last(held) / count) : 0;
        if ((Py_ssize_t)rest->bits_size * count != size_of_last(held)) {
            PyErr_SetString(PyExc_ValueError, "answer_bits is not a whole number of bytes for each row");
            return 0;
        }
    }
    if (labels != Py_None && !(rest->labels = bytes_of(held, labels, "labels", 4 * count, 0)))
        return 0;
    if (!offsets_fit(rest, count)) {
        PyErr_SetString(PyExc_IndexError, "the offsets of document starts fall, or leave the starts");
        return 0;
    }
    return 1;
}

/* ------------------------------------------------------------------ functions */

/* gather(tokens, starts, begins, lengths, slots, width, itemsize, padding, target, registers, lows, counts) */
static PyObject *gather(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    PyObject *tokens, *starts, *begins, *lengths, *slots, *target, *registers, *lows, *counts;
    Py_ssize_t width, itemsize;
    unsigned int padding;
    if (!PyArg_ParseTuple(arguments, "OOOOOnnIOOOO", &tokens, &starts, &begins, &lengths, &slots, &width, &itemsize,
                          &padding, &target, &registers, &lows, &counts))
        return NULL;
    Views held = {.count = 0};
    if (width < 1 || (itemsize != 2 && itemsize != 4)) {
        PyErr_SetString(PyExc_ValueError, "rows have at least one token, of two or four bytes");
        return done(&held, NULL);
    }
    size_t item = (size_t)itemsize, row_size = (size_t)width * item;
    const uint8_t *from = bytes_of(&held, tokens, "tokens", -1, 0);
    if (!from)
        return done(&held, NULL);
    Py_ssize_t num_tokens = size_of_last(&held) / itemsize;
    const uint32_t *place = bytes_of(&held, starts, "starts", -1, 0);
    if (!place)
        return done(&held, NULL);
    Py_ssize_t num_starts = size_of_last(&held) / 4;
    const int64_t *begin = bytes_of(&held, begins, "begins", -1, 0);
    if (!begin)
        return done(&held, NULL);
    Py_ssize_t count = size_of_last(&held) / 8;
    const int64_t *length = bytes_of(&held, lengths, "lengths", 8 * count, 0);
    const int64_t *slot = length ? bytes_of(&held, slots, "slots", 8 * count, 0) : NULL;
    uint32_t *state = slot ? bytes_of(&held, registers, "registers", -1, 1) : NULL;
    if (!state)
        return done(&held, NULL);
    Py_ssize_t num_slots = size_of_last(&held) / 4;
    uint8_t *to = bytes_of(&held, target, "target", num_slots * (Py_ssize_t)row_size, 1);
    int64_t *low = to ? bytes_of(&held, lows, "lows", 8 * num_slots, 1) : NULL;
    int64_t *found = low ? bytes_of(&held, counts, "counts", 8 * num_slots, 1) : NULL;
    if (!found)
        return done(&held, NULL);
    for (Py_ssize_t row = 0; row < count; row++)
        if (length[row] < 1 || length[row] > width || begin[row] < 0 || begin[row] > num_tokens - length[row] ||
            slot[row] < 0 || slot[row] >= num_slots) {
            PyErr_SetString(PyExc_IndexError, "a row leaves the tokens, or the block");
            return done(&held, NULL);
        }
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t first = 0; first < count; first += SIDE_BY_SIDE) {
        const uint8_t *rows[SIDE_BY_SIDE] = {0};
        uint32_t sizes[SIDE_BY_SIDE] = {0}, crc[SIDE_BY_SIDE];
        int some = count - first < SIDE_BY_SIDE ? (int)(count - first) : SIDE_BY_SIDE;
        for (int one = 0; one < some; one++) {
            Py_ssize_t row = first + one;
            uint8_t *into = to + (size_t)slot[row] * row_size;
            if (row + SIDE_BY_SIDE < count)
                ask_for(from + (size_t)begin[row + SIDE_BY_SIDE] * item, (size_t)length[row + SIDE_BY_SIDE] * item);
            memcpy(into, from + (size_t)begin[row] * item, (size_t)length[row] * item);
            for (size_t at = (size_t)length[row] * item; at < row_size; at += item)
                memcpy(into + at, &padding, item);
            rows[one] = into;
            sizes[one] = (uint32_t)length[row];
        }
        begin_rows(crc, rows, sizes, some, row_size);
        for (int one = 0; one < some; one++) {
            Py_ssize_t row = first + one, under = 0, above = num_starts;
            while (under < above) {
                Py_ssize_t middle = under + (above - under) / 2;
                if (place[middle] < begin[row])
                    under = middle + 1;
                else
                    above = middle;
            }
            Py_ssize_t last = under;
            while (last < num_starts && place[last] < begin[row] + length[row])
                last++;
            state[slot[row]] = crc[one];
            low[slot[row]] = under;
            found[slot[row]] = last - under;
        }
    }
    Py_END_ALLOW_THREADS;
    Py_INCREF(Py_None);
    return done(&held, Py_None);
}

/* copy_starts(starts, begins, slots, lows, offsets, out) */
static PyObject *copy_starts(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    PyObject *starts, *begins, *slots, *lows, *offsets, *out;
    if (!PyArg_ParseTuple(arguments, "OOOOOO", &starts, &begins, &slots, &lows, &offsets, &out))
        return NULL;
    Views held = {.count = 0};
    const uint32_t *place = bytes_of(&held, starts, "starts", -1, 0);
    if (!place)
        return done(&held, NULL);
    Py_ssize_t num_starts = size_of_last(&held) / 4;
    const int64_t *begin = bytes_of(&held, begins, "begins", -1, 0);
    if (!begin)
        return done(&held, NULL);
    Py_ssize_t count = size_of_last(&held) / 8;
    const int64_t *slot = bytes_of(&held, slots, "slots", 8 * count, 0);
    const int64_t *low = slot ? bytes_of(&held, lows, "lows", -1, 0) : NULL;
    if (!low)
        return done(&held, NULL);
    Py_ssize_t num_slots = size_of_last(&held) / 8;
    const int32_t *offset = bytes_of(&held, offsets, "offsets", 4 * (num_slots + 1), 0);
    uint32_t *to = offset ? bytes_of(&held, out, "out", -1, 1) : NULL;
    if (!to)
        return done(&held, NULL);
    Py_ssize_t room = size_of_last(&held) / 4;
    for (Py_ssize_t row = 0; row < count; row++) {
        int64_t at = slot[row];
        if (at < 0 || at >= num_slots || offset[at] < 0 || offset[at + 1] < offset[at] || offset[at + 1] > room ||
            low[at] < 0 || low[at] > num_starts - (offset[at + 1] - offset[at])) {
            PyErr_SetString(PyExc_IndexError, "document starts leave the shard, or the block");
            return done(&held, NULL);
        }
        for (int32_t one = offset[at]; one < offset[at + 1]; one++)
            to[one] = place[low[at] + (one - offset[at])] - (uint32_t)begin[row];
    }
    Py_INCREF(Py_None);
    return done(&held, Py_None);
}

/* begin(tokens, row_size, lengths, registers) */
static PyObject *begin(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    PyObject *tokens, *lengths, *registers;
    Py_ssize_t row_size;
    if (!PyArg_ParseTuple(arguments, "OnOO", &tokens, &row_size, &lengths, &registers))
        return NULL;
    Views held = {.count = 0};
    const uint32_t *length = bytes_of(&held, lengths, "lengths", -1, 0);
    if (!length)
        return done(&held, NULL);
    Py_ssize_t count = size_of_last(&held) / 4;
    const uint8_t *from = bytes_of(&held, tokens, "tokens", count * row_size, 0);
    uint32_t *state = from ? bytes_of(&held, registers, "registers", 4 * count, 1) : NULL;
    if (!state)
        return done(&held, NULL);
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t first = 0; first < count; first += SIDE_BY_SIDE) {
        int some = count - first < SIDE_BY_SIDE ? (int)(count - first) : SIDE_BY_SIDE;
        const uint8_t *rows[SIDE_BY_SIDE] = {0};
        for (int one = 0; one < some; one++)
            rows[one] = from + (size_t)(first + one) * (size_t)row_size;
        begin_rows(state + first, rows, length + first, some, (size_t)row_size);
    }
    Py_END_ALLOW_THREADS;
    Py_INCREF(Py_None);
    return done(&held, Py_None);
}

/* finish(registers, starts, offsets, answer_bits, labels), in place */
static PyObject *finish(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    PyObject *registers, *starts, *offsets, *bits, *labels;
    if (!PyArg_ParseTuple(arguments, "OOOOO", &registers, &starts, &offsets, &bits, &labels))
        return NULL;
    Views held = {.count = 0};
    Rest rest;
    uint32_t *state = bytes_of(&held, registers, "registers", -1, 1);
    if (!state)
        return done(&held, NULL);
    Py_ssize_t count = size_of_last(&held) / 4;
    if (!rest_of(&held, &rest, starts, offsets, bits, labels, count))
        return done(&held, NULL);
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t row = 0; row < count; row++)
        state[row] = end_row(state[row], &rest, row);
    Py_END_ALLOW_THREADS;
    Py_INCREF(Py_None);
    return done(&held, Py_None);
}

/* place(tokens, row_size, lengths, starts, offsets, answer_bits, labels, expected, places, target) -> first bad row */
static PyObject *place(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    PyObject *tokens, *lengths, *starts, *offsets, *bits, *labels, *expected, *places, *target;
    Py_ssize_t row_size;
    if (!PyArg_ParseTuple(arguments, "OnOOOOOOOO", &tokens, &row_size, &lengths, &starts, &offsets, &bits, &labels,
                          &expected, &places, &target))
        return NULL;
    Views held = {.count = 0};
    Rest rest;
    const uint32_t *length = bytes_of(&held, lengths, "lengths", -1, 0);
    if (!length)
        return done(&held, NULL);
    Py_ssize_t count = size_of_last(&held) / 4;
    const uint8_t *from = row_size < 1 ? NULL : bytes_of(&held, tokens, "tokens", count * row_size, 0);
    if (!from) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "a row has no bytes");
        return done(&held, NULL);
    }
    const uint32_t *wanted = bytes_of(&held, expected, "expected", 4 * count, 0);
    const int64_t *slot = wanted ? bytes_of(&held, places, "places", 8 * count, 0) : NULL;
    uint8_t *to = slot ? bytes_of(&held, target, "target", -1, 1) : NULL;
    if (!to)
        return done(&held, NULL);
    Py_ssize_t num_slots = size_of_last(&held) / row_size, bad = -1;
    if (!rest_of(&held, &rest, starts, offsets, bits, labels, count))
        return done(&held, NULL);
    for (Py_ssize_t row = 0; row < count; row++)
        if (slot[row] < 0 || slot[row] >= num_slots) {
            PyErr_SetString(PyExc_IndexError, "a row's place is none of the target's");
            return done(&held, NULL);
        }
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t first = 0; first < count && bad < 0; first += SIDE_BY_SIDE) {
        int some = count - first < SIDE_BY_SIDE ? (int)(count - first) : SIDE_BY_SIDE;
        const uint8_t *rows[SIDE_BY_SIDE] = {0};
        uint32_t crc[SIDE_BY_SIDE];
        for (int one = 0; one < some; one++) {
            rows[one] = from + (size_t)(first + one) * (size_t)row_size;
            if (first + one + SIDE_BY_SIDE < count)
                ask_for(rows[one] + SIDE_BY_SIDE * (size_t)row_size, (size_t)row_size);
        }
        begin_rows(crc, rows, length + first, some, (size_t)row_size);
        for (int one = 0; one < some && bad < 0; one++) {
            if (end_row(crc[one], &rest, first + one) == wanted[first + one])
                memcpy(to + (size_t)slot[first + one] * (size_t)row_size, rows[one], (size_t)row_size);
            else
                bad = first + one;
        }
    }
    Py_END_ALLOW_THREADS;
    return done(&held, PyLong_FromSsize_t(bad));
}

/* ------------------------------------------------------------------ order */

#define ROUNDS 8

/* A keyed permutation of 0 … size-1: as `data_service.order` describes it. */
typedef struct {
    uint64_t size, a, b, keys[ROUNDS];
} Permutation;

/* Consecutive samples of one part: a window of its shards in one epoch. Mirrors `data_service.row_kernel.Stretch`. */
typedef struct {
    uint64_t leaf, first;
    Permutation rows;
    uint64_t cut, missing, shard_rows, low, short_slot;
    Permutation shards;
    uint64_t last_shard, base;
} Stretch;

static inline uint64_t shifted(uint64_t value, uint64_t size, uint64_t other, uint64_t key)
{
    uint64_t noise = other + key;
    noise = (noise ^ (noise >> 30)) * 0xbf58476d1ce4e5b9u;
    noise = (noise ^ (noise >> 27)) * 0x94d049bb133111ebu;
    noise = (((noise >> 32) * size) >> 32) + value;
    return noise < size ? noise : noise - size;
}

static inline uint64_t permuted(const Permutation *one, uint64_t value)
{
    do {
        uint64_t left = value / one->b, right = value % one->b;
        for (int round = 0; round < ROUNDS; round += 2) {
            left = shifted(left, one->a, right, one->keys[round]);
            right = shifted(right, one->b, left, one->keys[round + 1]);
        }
        value = left * one->b + right;
    } while (value >= one->size);
    return value;
}

/* Shards of slots that were met before: a window has few, and thousands of rows. */
#define REMEMBERED 256

typedef struct {
    const Stretch *stretch;
    uint64_t slot, shard;
} Slot;

static inline uint64_t shard_of(const Stretch *one, uint64_t slot, Slot *memory)
{
    if (slot == one->short_slot)
        return one->last_shard;
    Slot *kept = &memory[(slot + (uint64_t)(uintptr_t)one / sizeof *one * 61) % REMEMBERED];
    if (kept->stretch != one || kept->slot != slot) {
        uint64_t moved = slot - (slot > one->short_slot);
        kept->shard = permuted(&one->shards, moved < one->shards.size ? moved : one->shards.size - 1);
        kept->stretch = one;
        kept->slot = slot;
    }
    return kept->shard;
}

static inline uint64_t row_of(const Stretch *one, uint64_t index, Slot *memory)
{
    uint64_t at = permuted(&one->rows, index - one->first);
    if (at >= one->cut)
        at += one->missing;
    uint64_t slot = at / one->shard_rows, offset = at % one->shard_rows;
    return one->base | (shard_of(one, one->low + slot, memory) * one->shard_rows + offset);
}

/* order(leaf, index, stretches, num_stretches, hints, rows, begin) -> first row that lies in no stretch, or their number */
static PyObject *order(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    PyObject *leaf, *index, *stretches, *hints, *rows;
    Py_ssize_t num_stretches, begin;
    if (!PyArg_ParseTuple(arguments, "OOOnOOn", &leaf, &index, &stretches, &num_stretches, &hints, &rows, &begin))
        return NULL;
    Views held = {.count = 0};
    uint64_t *to = bytes_of(&held, rows, "rows", -1, 1);
    if (!to)
        return done(&held, NULL);
    Py_ssize_t count = size_of_last(&held) / 8;
    const int64_t *part = bytes_of(&held, leaf, "leaf", 8 * count, 0);
    const uint64_t *sample = part ? bytes_of(&held, index, "index", 8 * count, 0) : NULL;
    const Stretch *known = sample ? bytes_of(&held, stretches, "stretches", -1, 0) : NULL;
    if (!known)
        return done(&held, NULL);
    if (num_stretches < 0 || size_of_last(&held) < num_stretches * (Py_ssize_t)sizeof *known) {
        PyErr_SetString(PyExc_ValueError, "there are fewer stretches than were said");
        return done(&held, NULL);
    }
    int64_t *hint = bytes_of(&held, hints, "hints", -1, 1);
    if (!hint)
        return done(&held, NULL);
    Py_ssize_t num_parts = size_of_last(&held) / 8, row = begin;
    Slot memory[REMEMBERED] = {{NULL, 0, 0}};
    Py_BEGIN_ALLOW_THREADS;
    for (; row >= 0 && row < count; row++) {
        if (part[row] < 0 || part[row] >= num_parts)
            break;
        /* Samples of a part come ascending: the stretch of the one before, or else one that was added later. */
        Py_ssize_t tried = 0, at = hint[part[row]];
        for (; tried < num_stretches; tried++, at++) {
            if (at < 0 || at >= num_stretches)
                at = 0;
            if (known[at].leaf == (uint64_t)part[row] && sample[row] - known[at].first < known[at].rows.size)
                break;
        }
        if (tried == num_stretches)
            break;
        hint[part[row]] = at;
        to[row] = row_of(&known[at], sample[row], memory);
    }
    Py_END_ALLOW_THREADS;
    return done(&held, PyLong_FromSsize_t(row));
}

/* ------------------------------------------------------------------ module */

static PyMethodDef functions[] = {
    {"order", order, METH_VARARGS, "Row ids of samples of parts; the first sample that lies in no stretch given."},
    {"gather", gather, METH_VARARGS, "Copy rows of a shard to their slots and begin their checksums."},
    {"copy_starts", copy_starts, METH_VARARGS, "Copy the document starts of gathered rows, counted from each row."},
    {"begin", begin, METH_VARARGS, "Begin the checksums of rows: lengths and tokens."},
    {"finish", finish, METH_VARARGS, "Finish checksums that were begun: starts, answer bits, classes."},
    {"place", place, METH_VARARGS, "Copy rows whose checksums fit to their places; -1, or the first that does not."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "stormjib_rows", "Rows of tokens: gathered, checked, placed.", -1, functions, 0, 0, 0, 0,
};

PyMODINIT_FUNC PyInit_stormjib_rows(void)
{
    make_table();
#ifdef HARDWARE
    in_hardware = has_hardware();
#endif
    return PyModule_Create(&module);
}
