// Sixteen lanes in two AVX2 registers.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct Avx2 {
  struct F {
    __m256 a, b;
  };
  struct I {
    __m256i a, b;
  };
  using W = I;

  // dot_int8 turns q + 128 back into q, since there is no exact product of two such bytes.
  static constexpr int kByteOffset = 0;

  static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
  }
  static F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  static F fma(F x, F y, F z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
  }
  static F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  static F abs(F x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
  }
  static float sum(F x) {
    float lanes[8], total = 0;
    _mm256_storeu_ps(lanes, _mm256_add_ps(x.a, x.b));
    for (float lane : lanes) total += lane;
    return total;
  }
  // The sums of four vectors, side by side.
  static void sum_four(F a, F b, F c, F d, float* p) {
    const __m256 x = _mm256_add_ps(a.a, a.b), y = _mm256_add_ps(b.a, b.b);
    const __m256 z = _mm256_add_ps(c.a, c.b), w = _mm256_add_ps(d.a, d.b);
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(x, y), _mm256_hadd_ps(z, w));
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }
  static float largest(F x) {
    float lanes[8];
    _mm256_storeu_ps(lanes, _mm256_max_ps(x.a, x.b));
    float found = lanes[0];
    for (float lane : lanes) found = lane > found ? lane : found;
    return found;
  }

  static F load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(load128(p)), _mm256_cvtph_ps(load128(p + 8))};
  }
  static void store_half(uint16_t* p, F x) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, kNearest));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, kNearest));
  }
  static F load_bfloat16(const uint16_t* p) {
    return even_bfloat16({_mm256_cvtepu16_epi32(load128(p)), _mm256_cvtepu16_epi32(load128(p + 8))});
  }
  // Half to even; for finite numbers.
  static void store_bfloat16(uint16_t* p, F x) {
    const __m256i words = _mm256_packus_epi32(rounded(x.a), rounded(x.b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(words, 0xd8));
  }
  static F load_int8(const int8_t* p) {
    const __m128i bytes = load128(p);
    return to_float({_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))});
  }
  // Sixteen int4 of two runs of four bytes (formats.py).
  static F load_int4(const uint8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m128i mask = _mm_set1_epi8(15);
    const __m128i low = _mm_and_si128(bytes, mask);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
    const __m128i all = _mm_unpacklo_epi32(low, high);
    return to_float({_mm256_cvtepu8_epi32(all), _mm256_cvtepu8_epi32(_mm_srli_si128(all, 8))});
  }

  static I set_int(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  static I add_int(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
  static int sum_int(I x) {
    int32_t lanes[8], total = 0;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), _mm256_add_epi32(x.a, x.b));
    for (int32_t lane : lanes) total += lane;
    return total;
  }
  static F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
  static I round(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }  // half to even
  static void store_int8(int8_t* p, I x) {
    // Packing works within halves of a register: put the four runs in order afterwards.
    const __m256i words = _mm256_packs_epi32(x.a, x.b);
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
    const __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  }
  // 2^n for whole n in -126..127.
  static F power_of_two(I n) {
    const I biased = add_int(n, set_int(127));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(biased.a, 23)),
            _mm256_castsi256_ps(_mm256_slli_epi32(biased.b, 23))};
  }

  static W load_bytes(const uint8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
  }
  static W low_halves(W w) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(w.a, mask), _mm256_and_si256(w.b, mask)};
  }
  static W high_halves(W w) { return low_halves({_mm256_srli_epi16(w.a, 4), _mm256_srli_epi16(w.b, 4)}); }
  // Lane r += sum over j < 4 of weights[4 r + j] * x[j].
  static I dot_int8(I sum, W w, const int8_t* x) {
    const __m256i four = quad(x);
    return {dot_signed(sum.a, w.a, four), dot_signed(sum.b, w.b, four)};
  }
  static I dot_int4(I sum, W w, const int8_t* x) {
    const __m256i four = quad(x);
    return {add_pairs(sum.a, _mm256_maddubs_epi16(w.a, four)),
            add_pairs(sum.b, _mm256_maddubs_epi16(w.b, four))};
  }
  // The first and the second of each pair of bfloat16.
  static F even_bfloat16(W w) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(w.a, 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(w.b, 16))};
  }
  static F odd_bfloat16(W w) {
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return {_mm256_castsi256_ps(_mm256_and_si256(w.a, mask)),
            _mm256_castsi256_ps(_mm256_and_si256(w.b, mask))};
  }
  static void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

 private:
  // The upper halves of floats, rounded to them.
  static __m256i rounded(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    return _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  }
  static __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static __m256i quad(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
  }
  static __m256i add_pairs(__m256i sum, __m256i products) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
  }
  // |q| times x with q's sign: two such products fit 16 bits, since neither is ever -128.
  static __m256i dot_signed(__m256i sum, __m256i stored, __m256i x) {
    const __m256i q = _mm256_xor_si256(stored, _mm256_set1_epi8(-128));
    return add_pairs(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(x, q)));
  }
};

}  // namespace
