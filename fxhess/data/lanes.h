// One sample a lane: the types, products and functions that generated programs are made of.
//
// The program defines T (float or double) first.  V holds W samples; U of them side by side are a
// pack, P = U * W samples.  An array of shape [n] "of packs" is V[n][U]; entry i of sample l is
// ((T*)a)[i * P + l].  Weights and other values that all samples share are plain arrays of T.
//
// Pointwise arithmetic is never contracted, so that sums of transposes stay symmetric bit for bit;
// products and elementary functions use fused multiply-adds where the processor has them.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int BYTES = 64, REGISTERS = 32;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int BYTES = 32, REGISTERS = 16;
#else
constexpr int BYTES = 16, REGISTERS = 16;
#endif
#define INLINE static inline __attribute__((always_inline))
#define OUTLINE static __attribute__((noinline))
#define UNROLL _Pragma("GCC unroll 32")  // what is added up stays in registers

constexpr bool DOUBLE = std::is_same<T, double>::value;
constexpr int W = BYTES / sizeof(T);
typedef T V __attribute__((vector_size(BYTES)));
typedef std::conditional<DOUBLE, int64_t, int32_t>::type Int;
typedef Int I __attribute__((vector_size(BYTES)));

// Less zero: x plus zero is no plain broadcast, for x = -0.
INLINE V all(T x) { return x - V{}; }
INLINE V all(V x) { return x; }

// A vector that stays in its register, where a compiler would rather read it again for every use.
INLINE V held(V x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__AVX2__)
  asm("" : "+x"(x));
#endif
  return x;
}
INLINE V bits(I x) { return (V)x; }
INLINE V select(I mask, V a, V b) { return mask ? a : b; }

// Conditions are 1 or 0, as numbers.
INLINE V number(I mask) { return bits(mask & (I)all(1)); }
INLINE T number(bool mask) { return mask; }
INLINE bool holds(T x) { return x != 0; }
INLINE I holds(V x) { return x != all(0); }
INLINE V where(V c, V a, V b) { return select(holds(c), a, b); }
INLINE T where(T c, T a, T b) { return holds(c) ? a : b; }

INLINE V fma_(V a, V b, V c) {
#if defined(__AVX512F__)
  if constexpr (DOUBLE) return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
  else return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  if constexpr (DOUBLE) return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  else return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// --- elementary functions ---------------------------------------------------------------------

template <class F> INLINE V each(F f, V x) {
  V y;
  for (int l = 0; l < W; l++) y[l] = f(x[l]);
  return y;
}

// A vector library's function where the program was given one, else the C library's, lane by lane.
#define FUNCTION(NAME, CALL)                                                                    \
  typedef V (*NAME##_type)(V);                                                                  \
  static NAME##_type NAME##_given = nullptr;                                                    \
  INLINE T NAME##_(T x) { return CALL; }                                                        \
  INLINE V NAME##_(V x) {                                                                       \
    if (NAME##_given) return NAME##_given(x);                                                   \
    return each([](T x) -> T { return CALL; }, x);                                              \
  }

INLINE T sqrt_(T x) { return std::sqrt(x); }
INLINE V sqrt_(V x) {
#if defined(__AVX512F__)
  if constexpr (DOUBLE) return (V)_mm512_sqrt_pd((__m512d)x);
  else return (V)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  if constexpr (DOUBLE) return (V)_mm256_sqrt_pd((__m256d)x);
  else return (V)_mm256_sqrt_ps((__m256)x);
#else
  return each([](T x) -> T { return std::sqrt(x); }, x);
#endif
}
INLINE T abs_(T x) { return std::fabs(x); }
INLINE V abs_(V x) { return select(x < all(0), -x, select(x == all(0), all(0), x)); }

template <int n> INLINE V polynomial(const T (&c)[n], V x) {
  V y = all(c[0]);
  UNROLL for (int i = 1; i < n; i++) y = fma_(y, x, all(c[i]));
  return y;
}

// exp(x) for |x| < 80 (700 in double): 2^n p(r) with x = n log 2 + r; to 1 unit in the last place.
INLINE V exp_moderate(V x) {
  constexpr T magic = DOUBLE ? 6755399441055744.0 : 12582912.0f;  // 1.5 2^52, 1.5 2^23
  constexpr int shift = DOUBLE ? 52 : 23;
  V shifted = fma_(x, all((T)1.4426950408889634074), all(magic));
  V n = shifted - all(magic);
  V r = fma_(n, all(DOUBLE ? (T)-6.93147180369123816490e-01 : (T)-0.693359375), x);
  r = fma_(n, all(DOUBLE ? (T)-1.90821492927058770002e-10 : (T)2.12194440054690583e-4), r);
  V p;
  if constexpr (DOUBLE) {
    constexpr T c[] = {2.5100375832561233664e-8, 2.7620075879983366586e-7, 2.7557268480310025526e-6,
                       0.000024801521322368693266, 0.00019841269863040545271, 0.0013888888917196719077,
                       0.0083333333333300644495, 0.041666666666624161903, 0.16666666666666667452,
                       0.50000000000000010211};
    p = polynomial(c, r);
  } else {
    constexpr T c[] = {(T)0.0013926176119935578884, (T)0.0083631730745137109028,
                       (T)0.041666554662050533982, (T)0.1666657702559798819, (T)0.5};
    p = polynomial(c, r);
  }
  p = fma_(p * r, r, r) + all(1);
  return bits((I)p + ((I)shifted << shift));
}

// x + x^3 q(x^2) near 0, 1 - 2 / (exp(2 x) + 1) elsewhere: no more than 2 units in the last place.
INLINE V tanh_(V x) {
  constexpr T far = DOUBLE ? 20 : 10;
  V s = x * x, small, a = select(x < all(0), -x, x);
  if constexpr (DOUBLE) {
    constexpr T c[] = {6.9340464209889533854e-6, -0.000032086614037935990533, 0.00009332432233847447191,
                       -0.00023795201383924994667, 0.00058976809946882677297, -0.0014557958855734634429,
                       0.0035921242500086923865, -0.0088632352928032893922, 0.021869488527368108414,
                       -0.053968253968085306218, 0.13333333333333206277, -0.33333333333333333175};
    small = polynomial(c, s);
  } else {
    constexpr T c[] = {(T)-0.0062691197196497291741, (T)0.021110959049514789646,
                       (T)-0.053873948848643333586, (T)0.13332915366987453388,
                       (T)-0.33333330332731547095};
    small = polynomial(c, s);
  }
  small = fma_(x * s, small, x);
  a = select(a > all(far), all(far), a);
  V large = all(1) - all(2) / (exp_moderate(a + a) + all(1));
  large = select(x < all(0), -large, large);
  return select(s < all((T)0.36), small, large);
}
INLINE T tanh_(T x) { return std::tanh(x); }

FUNCTION(exp, std::exp(x))
FUNCTION(exp2, std::exp2(x))
FUNCTION(expm1, std::expm1(x))
FUNCTION(log, std::log(x))
FUNCTION(log2, std::log2(x))
FUNCTION(log10, std::log10(x))
FUNCTION(log1p, std::log1p(x))
FUNCTION(sin, std::sin(x))
FUNCTION(cos, std::cos(x))
FUNCTION(tan, std::tan(x))
FUNCTION(asin, std::asin(x))
FUNCTION(acos, std::acos(x))
FUNCTION(atan, std::atan(x))
FUNCTION(sinh, std::sinh(x))
FUNCTION(cosh, std::cosh(x))
FUNCTION(asinh, std::asinh(x))
FUNCTION(acosh, std::acosh(x))
FUNCTION(atanh, std::atanh(x))
FUNCTION(erf, std::erf(x))
FUNCTION(erfc, std::erfc(x))
FUNCTION(lgamma, std::lgamma(x))

// In the order in which the program is given them.
#define GIVEN(NAME) NAME##_given = (NAME##_type)functions[i++];
extern "C" void use_functions(void* const* functions) {
  int i = 0;
  GIVEN(exp) GIVEN(exp2) GIVEN(expm1) GIVEN(log) GIVEN(log2) GIVEN(log10) GIVEN(log1p)
  GIVEN(sin) GIVEN(cos) GIVEN(tan) GIVEN(asin) GIVEN(acos) GIVEN(atan)
  GIVEN(sinh) GIVEN(cosh) GIVEN(asinh) GIVEN(acosh) GIVEN(atanh)
  GIVEN(erf) GIVEN(erfc) GIVEN(lgamma)
}
extern "C" int lane_bytes() { return BYTES; }

template <class X> INLINE X sigmoid_(X x) { return X{} + 1 / (X{} + 1 + exp_(-x)); }
// NaN where either is.
INLINE V maximum(V a, V b) { return select((a > b) | (a != a), a, b); }
INLINE T maximum(T a, T b) { return a > b || a != a ? a : b; }
INLINE V minimum(V a, V b) { return select((a < b) | (a != a), a, b); }
INLINE T minimum(T a, T b) { return a < b || a != a ? a : b; }

// --- products ---------------------------------------------------------------------------------

constexpr int ROWS = REGISTERS == 32 ? 6 : 4, COLUMNS = REGISTERS == 32 ? 4 : 3;
constexpr int PANEL = ROWS * COLUMNS;  // columns of a packed matrix that lie side by side
constexpr long DEEP = 256 * 4 / sizeof(T);  // terms of a sum that are added up at once

// Packs of n columns: c[n] (+)= sum_k a[k] w[k][n], for one row; w has PANEL columns.
template <int U, int n>
INLINE void panel(const V* a, long ak, const T* w, V* c, long cn, long K, bool more) {
  V sum[n][U];
  UNROLL for (int i = 0; i < n; i++)
    UNROLL for (int u = 0; u < U; u++) sum[i][u] = more ? c[i * cn * U + u] : all(0);
  for (long k = 0; k < K; k++) {
    V x[U];
    UNROLL for (int u = 0; u < U; u++) x[u] = a[k * ak * U + u];
    UNROLL for (int i = 0; i < n; i++) {
      V b = all(w[k * PANEL + i]);
      UNROLL for (int u = 0; u < U; u++) sum[i][u] = fma_(x[u], b, sum[i][u]);
    }
  }
  UNROLL for (int i = 0; i < n; i++)
    UNROLL for (int u = 0; u < U; u++) c[i * cn * U + u] = sum[i][u];
}

// All R rows times one panel of n columns, no more at once than there are registers for.
template <int U, int n>
OUTLINE void panels(const V* a, long ar, long ak, const T* w, V* c, long cr, long cn, long R, long K,
                   bool more) {
  constexpr int most = PANEL / U;
  if constexpr (n > 0) {
    constexpr int now = n < most ? n : most;
    for (long r = 0; r < R; r++)
      panel<U, now>(a + r * ar * U, ak, w, c + r * cr * U, cn, K, more);
    panels<U, n - now>(a, ar, ak, w + now, c + now * cn * U, cr, cn, R, K, more);
  }
}

// c[r][n] = sum_k a[r][k] w[k][n]: a and c of packs, w packed by pack(); `last` columns are left
// after whole panels.
template <int U, int last>
OUTLINE void flat_product(const V* a, long ar, long ak, const T* w, V* c, long cr, long cn, long R,
                          long N, long K) {
  const long done = N - last;
  for (long k = 0; k < K; k += DEEP) {
    const long now = K - k < DEEP ? K - k : DEEP;
    const V* from = a + k * ak * U;
    for (long n = 0; n < done; n += PANEL)
      panels<U, PANEL>(from, ar, ak, w + n * K + k * PANEL, c + n * cn * U, cr, cn, R, now, k > 0);
    if constexpr (last > 0)
      panels<U, last>(from, ar, ak, w + done * K + k * PANEL, c + done * cn * U, cr, cn, R, now,
                      k > 0);
  }
}

INLINE long packed_size(long K, long N) { return (N + PANEL - 1) / PANEL * PANEL * K; }

// w[k][n], read by get(k, n), as panels [N / PANEL][K][PANEL].
template <class F> INLINE void pack(F get, T* packed, long K, long N, int threads) {
  #pragma omp parallel for num_threads(threads) if (threads > 1 && K * N > 65536)
  for (long n = 0; n < N; n += PANEL)
    for (long k = 0; k < K; k++)
      for (long i = 0; i < PANEL; i++)
        packed[(n * K + k * PANEL) + i] = n + i < N ? get(k, n + i) : 0;
}

// c[r][n] (+)= sum_k a[r][k] b[n][k], sample by sample.
template <int U, int rows, int columns>
INLINE void tile(const V* a, long ar, long ak, const V* b, long bn, long bk, V* c, long cr, long cn,
                 long K, bool more) {
  UNROLL for (int u = 0; u < U; u++) {
    V sum[rows][columns];
    UNROLL for (int r = 0; r < rows; r++)
      UNROLL for (int n = 0; n < columns; n++)
        sum[r][n] = more ? c[(r * cr + n * cn) * U + u] : all(0);
    for (long k = 0; k < K; k++) {
      V y[columns];
      UNROLL for (int n = 0; n < columns; n++) y[n] = held(b[(n * bn + k * bk) * U + u]);
      UNROLL for (int r = 0; r < rows; r++) {
        V x = held(a[(r * ar + k * ak) * U + u]);
        UNROLL for (int n = 0; n < columns; n++) sum[r][n] = fma_(x, y[n], sum[r][n]);
      }
    }
    UNROLL for (int r = 0; r < rows; r++)
      UNROLL for (int n = 0; n < columns; n++) c[(r * cr + n * cn) * U + u] = sum[r][n];
  }
}

// `last` rows are left after whole tiles.
template <int U, int last, int columns>
INLINE void tiles(const V* a, long ar, long ak, const V* b, long bn, long bk, V* c, long cr, long cn,
                  long R, long K, bool more) {
  const long done = R - last;
  for (long r = 0; r < done; r += ROWS)
    tile<U, ROWS, columns>(a + r * ar * U, ar, ak, b, bn, bk, c + r * cr * U, cr, cn, K, more);
  if constexpr (last > 0)
    tile<U, last, columns>(a + done * ar * U, ar, ak, b, bn, bk, c + done * cr * U, cr, cn, K, more);
}

// `last` columns are left after whole tiles.
template <int U, int last_r, int last>
INLINE void rows(const V* a, long ar, long ak, const V* b, long bn, long bk, V* c, long cr, long cn,
                 long R, long N, long K, bool more) {
  const long done = N - last;
  for (long n = 0; n < done; n += COLUMNS)
    tiles<U, last_r, COLUMNS>(a, ar, ak, b + n * bn * U, bn, bk, c + n * cn * U, cr, cn, R, K, more);
  if constexpr (last > 0)
    tiles<U, last_r, last>(a, ar, ak, b + done * bn * U, bn, bk, c + done * cn * U, cr, cn, R, K,
                           more);
}

// A block of rows and terms stays in the cache nearest to the core, and meets all columns.
constexpr long BLOCK = 2 * ROWS, NEAR = 16 * 1024;

template <int U, int last_r, int last_n>
OUTLINE void lane_product(const V* a, long ar, long ak, const V* b, long bn, long bk, V* c, long cr,
                          long cn, long R, long N, long K) {
  const long fits = NEAR / (BLOCK * U * BYTES), parts = (K + fits - 1) / fits;
  const long deep = (K + parts - 1) / parts, whole = (R - last_r) / BLOCK * BLOCK;
  for (long k = 0; k < K; k += deep) {
    const long now = K - k < deep ? K - k : deep;
    const V *x = a + k * ak * U, *y = b + k * bk * U;
    for (long r = 0; r < whole; r += BLOCK)
      rows<U, 0, last_n>(x + r * ar * U, ar, ak, y, bn, bk, c + r * cr * U, cr, cn, BLOCK, N, now,
                         k > 0);
    if (whole < R)
      rows<U, last_r, last_n>(x + whole * ar * U, ar, ak, y, bn, bk, c + whole * cr * U, cr, cn,
                              R - whole, N, now, k > 0);
  }
}

// --- samples to lanes and back ----------------------------------------------------------------

// Rows x[sample][n] from sample `first` on as packs; after the last sample, that one again.
template <int U> static void load(const T* x, long n, long first, long samples, V* packs) {
  T* to = (T*)packs;
  for (long l = 0; l < U * W; l++) {
    long sample = first + l < samples ? first + l : samples - 1;
    for (long i = 0; i < n; i++) to[i * U * W + l] = x[sample * n + i];
  }
}

// The transpose of W vectors, by halves: a[i][j] and a[j][i] for the blocks of 1, 2, 4.. entries.
INLINE void transpose(V (&a)[W]) {
  UNROLL for (int h = 1; h < W; h *= 2) {
    I low, high;
    UNROLL for (int l = 0; l < W; l++) {
      low[l] = l & h ? W + (l - h) : l;
      high[l] = l & h ? W + l : l + h;
    }
    UNROLL for (int i = 0; i < W; i++)
      if (!(i & h)) {
        V x = a[i], y = a[i + h];
        a[i] = __builtin_shuffle(x, y, low);
        a[i + h] = __builtin_shuffle(x, y, high);
      }
  }
}

// n entries as rows that are `stride` apart; entry(i, u) gives vector u of entry i.
template <int U, class F>
INLINE void store(F entry, long n, T* out, long stride, long first, long samples) {
  const long count = samples - first < U * W ? samples - first : U * W;
  const long whole = count == U * W ? n / W * W : 0;
  out += first * stride;
  for (long i = 0; i < whole; i += W)
    UNROLL for (int u = 0; u < U; u++) {
      V a[W];
      UNROLL for (int l = 0; l < W; l++) a[l] = entry(i + l, u);
      transpose(a);
      UNROLL for (int l = 0; l < W; l++) std::memcpy(out + (u * W + l) * stride + i, &a[l], sizeof(V));
    }
  for (long i = whole; i < n; i++)
    for (int u = 0; u < U; u++) {
      const V a = entry(i, u);
      for (long l = 0; l < W && u * W + l < count; l++) out[(u * W + l) * stride + i] = a[l];
    }
}

// The same of packs.
template <int U>
static void store_packs(const V* packs, long n, T* out, long stride, long first, long samples) {
  store<U>([&](long i, int u) { return packs[i * U + u]; }, n, out, stride, first, samples);
}

// A + A^T for an A of [d, d] that is symmetric but for rounding, as entries of rows that lie d * d
// apart.  product(start, stop, c) gives rows `start` to `stop` of A up to column `stop`; `rows` has
// room for those of a block.  The program defines SYMMETRIC_ROWS, those of a block.
static_assert(SYMMETRIC_ROWS % ROWS == 0 && SYMMETRIC_ROWS % COLUMNS == 0, "whole tiles");
static_assert(SYMMETRIC_ROWS % PANEL == 0, "whole panels");

template <int U, class F>
static void store_symmetric(F product, V* rows, long d, T* out, long first, long samples) {
  const V two = all(2);
  for (long start = 0; start < d; start += SYMMETRIC_ROWS) {
    const long stop = start + SYMMETRIC_ROWS < d ? start + SYMMETRIC_ROWS : d;
    product(start, stop, rows);
    for (long r = start; r < stop; r++) {
      const auto entry = [&](long n, int u) {
        const long low = n < r ? n : r, high = n < r ? r : n;
        return rows[((high - start) * stop + low) * U + u] * two;
      };
      store<U>(entry, stop, out + r * d, d * d, first, samples);
    }
    for (long n = 0; n < start; n++) {
      const auto entry = [&](long r, int u) { return rows[(r * stop + n) * U + u] * two; };
      store<U>(entry, stop - start, out + n * d + start, d * d, first, samples);
    }
  }
}

// --- the whole --------------------------------------------------------------------------------

INLINE void* room(size_t bytes) { return std::aligned_alloc(64, (bytes + 127) / 64 * 64); }

constexpr int NO_ROOM = 1, OUTSIDE = 2;

// Vectors of a wide block: what it works on should stay in the cache of one core.  With two vectors
// of 64 bytes a net of [200, 200] took 8 percent longer, with four of 32 bytes products with
// [400, 5050] took a quarter longer.
constexpr int WIDTH = BYTES == 64 ? 1 : 2;

// What all samples share once, then a few samples at a time, by a team of threads.  `kept`, where it
// is given, has room for packed matrices, and holds those that need not be packed again where they
// are `known`.
template <class Once, class Block>
static int in_blocks(void* const* p, void* const* k, long samples, int threads, size_t shared_size,
                     T* kept, size_t packed_size, int known, size_t own_size, Once once, Block narrow,
                     Block wide) {
  T* const shared = (T*)room(shared_size * sizeof(T));
  T* const packed = kept ? kept : (T*)room(packed_size * sizeof(T));
  int failed = shared && packed ? once(p, k, shared, packed, threads, known) : NO_ROOM;
  if (!failed) {
    const int U = samples >= 2L * WIDTH * W * threads ? WIDTH : 1;
    const long step = U * W, blocks = (samples + step - 1) / step;
    const int team = (int)(blocks < threads ? blocks : threads);
    #pragma omp parallel num_threads(team) if (team > 1)
    {
      V* const own = (V*)room(own_size * U * sizeof(V));
      if (!own) {
        #pragma omp atomic write
        failed = NO_ROOM;
      }
      #pragma omp for schedule(dynamic, 1)
      for (long i = 0; i < blocks; i++)
        if (own) (U == 1 ? narrow : wide)(p, k, shared, packed, own, i * step, samples);
      std::free(own);
    }
  }
  std::free(shared);
  if (!kept) std::free(packed);
  return failed;
}
