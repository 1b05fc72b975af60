/* xxh3-64, seed 0, of more than 240 bytes that come in pieces; as in doc/xxhash_spec.md of github.com/Cyan4973/xxHash. */

#ifndef KVBM_XXH3_H
#define KVBM_XXH3_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

enum { XXH3_FROM = 241, STRIPE = 64, STRIPES = 16, MERGE_KEY = 11, LAST_KEY = 121, SCRAMBLE_KEY = 128 };

static const uint64_t PRIME32_1 = 0x9E3779B1, PRIME32_2 = 0x85EBCA77, PRIME32_3 = 0xC2B2AE3D,
                      PRIME64_1 = 0x9E3779B185EBCA87, PRIME64_2 = 0xC2B2AE3D27D4EB4F, PRIME64_3 = 0x165667B19E3779F9,
                      PRIME64_4 = 0x85EBCA77C2B2AE63, PRIME64_5 = 0x27D4EB2F165667C5;

static const unsigned char SECRET[192] __attribute__((aligned(64))) = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d, 0xe9,
    0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78,
    0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6,
    0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f,
    0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31,
    0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff,
    0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

/* `tail` is the stripe that was taken last, and the `held` bytes after it: a stripe is taken once a byte follows it. */
struct xxh3 {
    uint64_t acc[8], length, taken;
    size_t held;
    unsigned char tail[2 * STRIPE];
};

static uint64_t word(const unsigned char *at) {
    uint64_t value;
    memcpy(&value, at, 8);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    value = __builtin_bswap64(value);
#endif
    return value;
}

static void xxh3_begin(struct xxh3 *h) {
    const uint64_t acc[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    memset(h, 0, sizeof *h);
    memcpy(h->acc, acc, sizeof acc);
}

static void accumulate(uint64_t *acc, const unsigned char *data, const unsigned char *key) {
    for (int i = 0; i < 8; i++) {
        uint64_t value = word(data + 8 * i), mixed = value ^ word(key + 8 * i);
        acc[i ^ 1] += value;
        acc[i] += (mixed & 0xffffffff) * (mixed >> 32);
    }
}

static void take(struct xxh3 *h, const unsigned char *data, size_t stripes) {
    for (; stripes; stripes--, data += STRIPE) {
        accumulate(h->acc, data, SECRET + 8 * (h->taken % STRIPES));
        if (++h->taken % STRIPES == 0) {
            for (int i = 0; i < 8; i++) {
                h->acc[i] = (h->acc[i] ^ h->acc[i] >> 47 ^ word(SECRET + SCRAMBLE_KEY + 8 * i)) * PRIME32_1;
            }
        }
    }
}

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2"))) static __m256i mixed(__m256i acc, __m256i data, const void *key) {
    __m256i keyed = _mm256_xor_si256(data, _mm256_loadu_si256(key));
    __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
    return _mm256_add_epi64(acc, _mm256_add_epi64(_mm256_shuffle_epi32(data, 0x4E), product));
}

__attribute__((target("avx2"))) static __m256i scrambled(__m256i acc, const void *key) {
    const __m256i prime = _mm256_set1_epi64x((long long)PRIME32_1);
    acc = _mm256_xor_si256(_mm256_xor_si256(acc, _mm256_srli_epi64(acc, 47)), _mm256_loadu_si256(key));
    __m256i high = _mm256_slli_epi64(_mm256_mul_epu32(_mm256_srli_epi64(acc, 32), prime), 32);
    return _mm256_add_epi64(_mm256_mul_epu32(acc, prime), high);
}

/* The same as `take`, four lanes at once. */
__attribute__((target("avx2"))) static void take_avx2(struct xxh3 *h, const unsigned char *data, size_t stripes) {
    __m256i low = _mm256_loadu_si256((const void *)h->acc), high = _mm256_loadu_si256((const void *)(h->acc + 4));
    while (stripes) {
        size_t first = h->taken % STRIPES, some = stripes < STRIPES - first ? stripes : STRIPES - first;
        for (size_t i = 0; i < some; i++, data += STRIPE) {
            const unsigned char *key = SECRET + 8 * (first + i);
            low = mixed(low, _mm256_loadu_si256((const void *)data), key);
            high = mixed(high, _mm256_loadu_si256((const void *)(data + 32)), key + 32);
        }
        if (first + some == STRIPES) {
            low = scrambled(low, SECRET + SCRAMBLE_KEY);
            high = scrambled(high, SECRET + SCRAMBLE_KEY + 32);
        }
        h->taken += some;
        stripes -= some;
    }
    _mm256_storeu_si256((void *)h->acc, low);
    _mm256_storeu_si256((void *)(h->acc + 4), high);
}
#endif

static void xxh3_add(struct xxh3 *h, const void *bytes, size_t n) {
    const unsigned char *data = bytes;
    void (*taking)(struct xxh3 *, const unsigned char *, size_t) = take;
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_supports("avx2")) {
        taking = take_avx2;
    }
#endif
    h->length += n;
    while (n) {
        if (h->held == STRIPE) {
            taking(h, h->tail + STRIPE, 1);
            memcpy(h->tail, h->tail + STRIPE, STRIPE);
            h->held = 0;
        }
        if (h->held == 0 && n > STRIPE) {
            size_t stripes = (n - 1) / STRIPE;
            taking(h, data, stripes);
            data += stripes * STRIPE;
            n -= stripes * STRIPE;
            memcpy(h->tail, data - STRIPE, STRIPE);
        }
        size_t some = n < STRIPE - h->held ? n : STRIPE - h->held;
        memcpy(h->tail + STRIPE + h->held, data, some);
        h->held += some;
        data += some;
        n -= some;
    }
}

static uint64_t xxh3_end(struct xxh3 *h) {
    accumulate(h->acc, h->tail + h->held, SECRET + LAST_KEY);
    uint64_t hash = h->length * PRIME64_1;
    for (int i = 0; i < 8; i += 2) {
        const unsigned char *key = SECRET + MERGE_KEY + 8 * i;
        __uint128_t product = (__uint128_t)(h->acc[i] ^ word(key)) * (h->acc[i + 1] ^ word(key + 8));
        hash += (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    hash = (hash ^ hash >> 37) * 0x165667919E3779F9;
    return hash ^ hash >> 32;
}

#endif
