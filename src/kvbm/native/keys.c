/* Keys of a prompt's blocks, each the SHA-256 of the key before it and its block's tokens: a whole prompt per call.
 *
 * A loop over hashlib pays for several Python objects per block, more than hashing 96 bytes costs. SHA-256 is that of
 * FIPS 180-4, with the processor's instructions for it where it has them, and in plain C elsewhere. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_SHA_NI 1
#include <cpuid.h>
#include <immintrin.h>
#else
#define HAVE_SHA_NI 0
#endif

enum { DIGEST = 32, CHUNK = 64 };

/* From so many bytes on, hashing goes without the GIL. Less takes about 0.15 ms (0.7 in plain C), and to get the GIL back
 * from a busy thread takes up to 5 ms. */
enum { ALONE_FROM = 128 << 10 };

/* -- SHA-256: FIPS 180-4, sections 4.1.2, 4.2.2, 5.1.1, 5.3.3 and 6.2 -- */

static const uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static const uint32_t INITIAL[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

/* Takes `chunks` chunks of 64 bytes into the state. */
typedef void (*Compress)(uint32_t state[8], const uint8_t *data, size_t chunks);

static inline uint32_t rotated(uint32_t x, int n) { return x >> n | x << (32 - n); }

static inline uint32_t load_be(const uint8_t *p) {
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static inline void store_be(uint8_t *p, uint32_t x) {
    p[0] = (uint8_t)(x >> 24), p[1] = (uint8_t)(x >> 16), p[2] = (uint8_t)(x >> 8), p[3] = (uint8_t)x;
}

static void compress_portable(uint32_t state[8], const uint8_t *data, size_t chunks) {
    for (; chunks > 0; chunks--, data += CHUNK) {
        uint32_t w[64], a = state[0], b = state[1], c = state[2], d = state[3];
        uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
        for (int t = 0; t < 16; t++) {
            w[t] = load_be(data + 4 * t);
        }
        for (int t = 16; t < 64; t++) {
            uint32_t x = w[t - 15], y = w[t - 2];
            w[t] = w[t - 16] + (rotated(x, 7) ^ rotated(x, 18) ^ x >> 3) + w[t - 7] +
                   (rotated(y, 17) ^ rotated(y, 19) ^ y >> 10);
        }
#pragma GCC unroll 8
        for (int t = 0; t < 64; t++) {
            uint32_t one = h + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) + (g ^ (e & (f ^ g))) + K[t] + w[t];
            uint32_t two = (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) + ((a & b) | (c & (a | b)));
            h = g, g = f, f = e, e = d + one, d = c, c = b, b = a, a = one + two;
        }
        state[0] += a, state[1] += b, state[2] += c, state[3] += d;
        state[4] += e, state[5] += f, state[6] += g, state[7] += h;
    }
}

static Compress fastest = compress_portable; /* set once, when the module is loaded */

#if HAVE_SHA_NI
/* The instructions want the state as ABEF and CDGH; one of them does two rounds. */
__attribute__((target("sha,sse4.1,ssse3"))) static void compress_sha_ni(uint32_t state[8], const uint8_t *data,
                                                                        size_t chunks) {
    const __m128i big_endian = _mm_set_epi8(12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3);
    __m128i cdab = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)state), 0xB1);
    __m128i efgh = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)(state + 4)), 0x1B);
    __m128i abef = _mm_alignr_epi8(cdab, efgh, 8), cdgh = _mm_blend_epi16(efgh, cdab, 0xF0);
    for (; chunks > 0; chunks--, data += CHUNK) {
        __m128i w[4], abef_before = abef, cdgh_before = cdgh;
#pragma GCC unroll 16
        for (int k = 0; k < 16; k++) { /* four rounds each, with four words of the schedule */
            __m128i *now = &w[k & 3], last = w[(k + 3) & 3];
            if (k < 4) {
                *now = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(data + 16 * k)), big_endian);
            } else {
                __m128i sum = _mm_add_epi32(_mm_sha256msg1_epu32(*now, w[(k + 1) & 3]),
                                            _mm_alignr_epi8(last, w[(k + 2) & 3], 4));
                *now = _mm_sha256msg2_epu32(sum, last);
            }
            __m128i added = _mm_add_epi32(*now, _mm_loadu_si128((const __m128i *)(K + 4 * k)));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, added);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(added, 0x0E));
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    __m128i feba = _mm_shuffle_epi32(abef, 0x1B), dchg = _mm_shuffle_epi32(cdgh, 0xB1);
    _mm_storeu_si128((__m128i *)state, _mm_blend_epi16(feba, dchg, 0xF0));
    _mm_storeu_si128((__m128i *)(state + 4), _mm_alignr_epi8(dchg, feba, 8));
}

/* __builtin_cpu_supports does not know "sha" in every compiler that has the intrinsics. */
static int has_sha_ni(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & 1u << 29) && __builtin_cpu_supports("sse4.1") &&
           __builtin_cpu_supports("ssse3");
}
#endif

typedef struct {
    uint32_t state[8];
    uint64_t total;
    uint8_t chunk[CHUNK]; /* the last total % CHUNK bytes */
    Compress compress;
} Hash;

static void begin(Hash *h, Compress compress) {
    memcpy(h->state, INITIAL, sizeof(INITIAL));
    h->total = 0;
    h->compress = compress;
}

static void add(Hash *h, const void *bytes, size_t n) {
    const uint8_t *data = bytes;
    size_t have = h->total % CHUNK;
    h->total += n;
    if (have) {
        size_t take = n < CHUNK - have ? n : CHUNK - have;
        memcpy(h->chunk + have, data, take);
        if (have + take < CHUNK) {
            return;
        }
        h->compress(h->state, h->chunk, 1);
        data += take;
        n -= take;
    }
    if (n >= CHUNK) {
        h->compress(h->state, data, n / CHUNK);
        data += n / CHUNK * CHUNK;
    }
    memcpy(h->chunk, data, n % CHUNK);
}

static void end(Hash *h, uint8_t digest[DIGEST]) {
    size_t have = h->total % CHUNK;
    h->chunk[have++] = 0x80;
    if (have > CHUNK - 8) {
        memset(h->chunk + have, 0, CHUNK - have);
        h->compress(h->state, h->chunk, 1);
        have = 0;
    }
    memset(h->chunk + have, 0, CHUNK - 8 - have);
    store_be(h->chunk + CHUNK - 8, (uint32_t)(h->total >> 29)); /* the length in bits */
    store_be(h->chunk + CHUNK - 4, (uint32_t)(h->total << 3));
    h->compress(h->state, h->chunk, 1);
    for (int k = 0; k < 8; k++) {
        store_be(digest + 4 * k, h->state[k]);
    }
}

/* -- Tokens: what a caller has, as little-endian uint32 -- */

typedef struct {
    uint32_t *at;
    Py_ssize_t n;
} Tokens;

static inline uint32_t little_endian(uint32_t x) { return PY_BIG_ENDIAN ? __builtin_bswap32(x) : x; }

static int tokens_new(Tokens *t, Py_ssize_t n) {
    t->n = n;
    t->at = n <= PY_SSIZE_T_MAX / (Py_ssize_t)sizeof(uint32_t) ? PyMem_Malloc((size_t)n * sizeof(uint32_t)) : NULL;
    if (!t->at) {
        PyErr_NoMemory();
        return -1;
    }
    return 0;
}

/* The int `item` as a token, or -1, without an error set, if it is none. */
static int64_t token_in(PyObject *item) {
    int overflow;
    int64_t value = PyLong_AsLongLongAndOverflow(item, &overflow);
    return value >= 0 && value <= UINT32_MAX ? value : -1;
}

/* What is no such int: a number of another type, or -1 with an error set. May run Python code. */
static int64_t token_of(PyObject *item, Py_ssize_t at) {
    if (!PyIndex_Check(item)) {
        PyErr_Format(PyExc_TypeError, "tokens[%zd] must be an int, not %.200s", at, Py_TYPE(item)->tp_name);
        return -1;
    }
    PyObject *number = PyNumber_Index(item);
    int64_t value = number ? token_in(number) : -1;
    if (number && value < 0) {
        PyErr_Format(PyExc_ValueError, "tokens[%zd] is %S, not in 0..4294967295", at, number);
    }
    Py_XDECREF(number);
    return value;
}

/* From a list or tuple. */
static int tokens_of_items(Tokens *t, PyObject *items) {
    Py_ssize_t n = PySequence_Fast_GET_SIZE(items);
    if (tokens_new(t, n) < 0) {
        return -1;
    }
    for (Py_ssize_t k = 0; k < n; k++) {
        PyObject *item = PySequence_Fast_GET_ITEM(items, k);
        int64_t token = PyLong_Check(item) ? token_in(item) : -1;
        if (token < 0) {
            Py_INCREF(item); /* Python code may take it out of the list */
            token = token_of(item, k);
            Py_DECREF(item);
            if (token < 0) {
                return -1;
            }
            if (PySequence_Fast_GET_SIZE(items) != n) {
                PyErr_SetString(PyExc_ValueError, "tokens changed while they were read");
                return -1;
            }
        }
        t->at[k] = little_endian((uint32_t)token);
    }
    return 0;
}

static int tokens_of_view(Tokens *t, const Py_buffer *view) {
    const char *format = view->format ? view->format : "B";
    format += *format == '@' || *format == '=' || (*format == '<' && PY_LITTLE_ENDIAN);
    int is_int = *format && strchr("iIlLqQ", *format) && !format[1];
    if (view->ndim != 1 || !is_int || (view->itemsize != 4 && view->itemsize != 8)) {
        PyErr_SetString(PyExc_ValueError, "tokens as a buffer must be one-dimensional, of 32- or 64-bit integers");
        return -1;
    }
    if (tokens_new(t, view->shape[0]) < 0) {
        return -1;
    }
    int is_signed = strchr("ilq", *format) != NULL;
    const char *from = view->buf;
    for (Py_ssize_t k = 0; k < t->n; k++, from += view->itemsize) {
        uint64_t value = 0; /* a negative one becomes too large */
        uint32_t narrow;
        if (view->itemsize == 8) {
            memcpy(&value, from, 8);
        } else {
            memcpy(&narrow, from, 4);
            value = is_signed ? (uint64_t)(int64_t)(int32_t)narrow : narrow;
        }
        if (value > UINT32_MAX) {
            if (is_signed) {
                PyErr_Format(PyExc_ValueError, "tokens[%zd] is %lld, not in 0..4294967295", k, (long long)value);
            } else {
                PyErr_Format(PyExc_ValueError, "tokens[%zd] is %llu, not in 0..4294967295", k,
                             (unsigned long long)value);
            }
            return -1;
        }
        t->at[k] = little_endian((uint32_t)value);
    }
    return 0;
}

/* A copy, so that nothing of the caller's is read without the GIL. The caller frees `at`, after an error too. */
static int tokens_of(Tokens *t, PyObject *object) {
    t->at = NULL;
    if (PyList_Check(object) || PyTuple_Check(object)) {
        return tokens_of_items(t, object);
    }
    if (PyObject_CheckBuffer(object)) {
        Py_buffer view;
        if (PyObject_GetBuffer(object, &view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) < 0) {
            return -1;
        }
        int failed = tokens_of_view(t, &view);
        PyBuffer_Release(&view);
        return failed;
    }
    if (!PySequence_Check(object)) { /* a set has no order, and an iterator is gone afterwards */
        PyErr_Format(PyExc_TypeError, "tokens must be a sequence or a buffer of ints, not %.200s",
                     Py_TYPE(object)->tp_name);
        return -1;
    }
    PyObject *items = PySequence_Tuple(object);
    int failed = items ? tokens_of_items(t, items) : -1;
    Py_XDECREF(items);
    return failed;
}

/* -- chain -- */

/* Checks `extras` for `blocks` blocks; the bytes of all of them, or -1 with an error set. */
static Py_ssize_t extras_size(PyObject *extras, Py_ssize_t blocks) {
    Py_ssize_t size = 0;
    if (!PyTuple_CheckExact(extras)) {
        PyErr_Format(PyExc_TypeError, "extras must be a tuple, not %.200s", Py_TYPE(extras)->tp_name);
        return -1;
    }
    if (PyTuple_GET_SIZE(extras) > blocks) {
        PyErr_Format(PyExc_ValueError, "%zd extras for %zd blocks", PyTuple_GET_SIZE(extras), blocks);
        return -1;
    }
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(extras); k++) {
        PyObject *extra = PyTuple_GET_ITEM(extras, k);
        if (!PyBytes_CheckExact(extra)) {
            PyErr_Format(PyExc_TypeError, "extras[%zd] must be bytes, not %.200s", k, Py_TYPE(extra)->tp_name);
            return -1;
        }
        if (PyBytes_GET_SIZE(extra) > PY_SSIZE_T_MAX - size) { /* one object many times */
            PyErr_SetString(PyExc_ValueError, "extras are too large");
            return -1;
        }
        size += PyBytes_GET_SIZE(extra);
    }
    return size;
}

/* Reads only what is immutable or ours: it may run without the GIL. */
static void hash_chain(const uint8_t *parent, const Tokens *t, Py_ssize_t block_tokens, Py_ssize_t blocks,
                       PyObject *extras, Compress compress, uint8_t *digests) {
    Hash h;
    for (Py_ssize_t k = 0; k < blocks; k++) {
        begin(&h, compress);
        add(&h, parent, DIGEST);
        add(&h, t->at + k * block_tokens, (size_t)block_tokens * sizeof(uint32_t));
        if (k < PyTuple_GET_SIZE(extras)) {
            PyObject *extra = PyTuple_GET_ITEM(extras, k);
            add(&h, PyBytes_AS_STRING(extra), (size_t)PyBytes_GET_SIZE(extra));
        }
        end(&h, digests + k * DIGEST);
        parent = digests + k * DIGEST;
    }
}

static PyObject *keys_of(const uint8_t *digests, Py_ssize_t blocks) {
    PyObject *keys = PyList_New(blocks);
    for (Py_ssize_t k = 0; keys && k < blocks; k++) {
        PyObject *key = PyBytes_FromStringAndSize((const char *)digests + k * DIGEST, DIGEST);
        if (!key) {
            Py_CLEAR(keys);
        } else {
            PyList_SET_ITEM(keys, k, key);
        }
    }
    return keys;
}

static PyObject *chain_tokens(const uint8_t *parent, const Tokens *t, Py_ssize_t block_tokens, PyObject *extras,
                              Compress compress) {
    Py_ssize_t blocks = t->n / block_tokens, size = extras_size(extras, blocks);
    if (size < 0) {
        return NULL;
    }
    uint8_t *digests = blocks <= PY_SSIZE_T_MAX / DIGEST ? PyMem_Malloc((size_t)blocks * DIGEST) : NULL;
    if (!digests) {
        return PyErr_NoMemory();
    }
    if (blocks * DIGEST + t->n * (Py_ssize_t)sizeof(uint32_t) < ALONE_FROM && size < ALONE_FROM) {
        hash_chain(parent, t, block_tokens, blocks, extras, compress, digests);
    } else {
        Py_BEGIN_ALLOW_THREADS;
        hash_chain(parent, t, block_tokens, blocks, extras, compress, digests);
        Py_END_ALLOW_THREADS;
    }
    PyObject *keys = keys_of(digests, blocks);
    PyMem_Free(digests);
    return keys;
}

static PyObject *chain(PyObject *Py_UNUSED(self), PyObject *const *args, Py_ssize_t count) {
    if (count != 4 && count != 5) {
        return PyErr_Format(PyExc_TypeError, "chain takes 4 or 5 arguments, got %zd", count);
    }
    if (!PyBytes_CheckExact(args[0]) || PyBytes_GET_SIZE(args[0]) != DIGEST) {
        return PyErr_Format(PyExc_ValueError, "parent must be bytes, %d of them", DIGEST);
    }
    Py_ssize_t block_tokens = PyNumber_AsSsize_t(args[2], PyExc_ValueError);
    if (block_tokens == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (block_tokens < 1) {
        return PyErr_Format(PyExc_ValueError, "block_tokens is %zd, not at least 1", block_tokens);
    }
    int portable = count == 5 ? PyObject_IsTrue(args[4]) : 0;
    if (portable < 0) {
        return NULL;
    }
    Tokens tokens;
    PyObject *keys = NULL;
    if (tokens_of(&tokens, args[1]) == 0) {
        keys = chain_tokens((const uint8_t *)PyBytes_AS_STRING(args[0]), &tokens, block_tokens, args[3],
                            portable ? compress_portable : fastest);
    }
    PyMem_Free(tokens.at);
    return keys;
}

static PyMethodDef METHODS[] = {
    {"chain", (PyCFunction)(void (*)(void))chain, METH_FASTCALL, PyDoc_STR("See _keys.pyi.")},
    {NULL, NULL, 0, NULL},
};

static int choose(PyObject *module) {
#if HAVE_SHA_NI
    fastest = has_sha_ni() ? compress_sha_ni : compress_portable;
#endif
    return PyModule_AddObjectRef(module, "HARDWARE", fastest == compress_portable ? Py_False : Py_True);
}

static PyModuleDef_Slot SLOTS[] = {{Py_mod_exec, choose}, {0, NULL}};

static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "kvbm.native._keys", NULL, 0, METHODS, SLOTS, NULL, NULL,
                                    NULL};

PyMODINIT_FUNC PyInit__keys(void) { return PyModuleDef_Init(&MODULE); }
