/* decode_rows.cu: codes -> W, for products of many rows and for dense copies. */
#include "cuda/launch.cuh"

namespace aqlm_cuda {
namespace {

constexpr int THREADS = 512, AHEAD = 4; /* groups a thread has in flight */

/* The part of W that is decoded: outputs from first_out, groups from first_group. */
struct Part {
    int64_t first_out, outs;
    int groups, first_group, part_groups, entries; /* groups: of a whole row */
};

/* Of codebooks in shared memory; of float32 an entry is two uint4. */
template <class B, int K> constexpr int COPIES_OF = sizeof(B) == 4 ? (K > 4 ? 2 : K > 2 ? 4 : 8) : (K > 6 ? 4 : 8);

template <class B> __device__ void add_entry(float (&sum)[8], const uint4 (&words)[sizeof(B) / 2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if constexpr (sizeof(B) == 4) {
            const auto *v = reinterpret_cast<const float *>(words) + 2 * i;
            sum[2 * i] += v[0], sum[2 * i + 1] += v[1];
        } else {
            const float2 v = Pair<B>::to_float2(reinterpret_cast<const typename Pair<B>::type *>(words)[i]);
            sum[2 * i] += v.x, sum[2 * i + 1] += v.y;
        }
}

/* g = 8, og = 1: a thread decodes groups of 16 bytes, of T, from codebooks of B. For B <= 8 bits these lie in shared
 * memory up to eight times, each lane reading its own banks; larger ones are read through L2. Sums are fp32, in the
 * order of the codebooks. */
template <class T, class B, int K, int CODE>
__global__ void __launch_bounds__(THREADS)
    decode_kernel(uint4 *rows, const unsigned char *codes, const uint4 *books, const B *scales, const Part p) {
    constexpr int COPIES = COPIES_OF<B, K>, WORDS = sizeof(B) / 2;
    extern __shared__ uint4 copies[]; /* [K][entries][WORDS][COPIES] */
    const int copy = threadIdx.x % COPIES;
    if constexpr (CODE == 1) {
        for (int i = threadIdx.x; i < K * p.entries * WORDS * COPIES; i += THREADS)
            copies[i] = __ldg(books + i / COPIES);
        __syncthreads();
    }
    using Vector = typename std::conditional_t<
        K * CODE == 1, uint8_t,
        std::conditional_t<K * CODE == 2, uint16_t, std::conditional_t<K * CODE == 4, uint32_t, uint2>>>;
    union Codes {
        Vector vector;
        std::conditional_t<CODE == 1, uint8_t, uint16_t> code[K];
    };
    const int64_t steps = divide_up(p.part_groups, THREADS * AHEAD); /* of a row */
    for (int64_t step = blockIdx.x; step < steps * p.outs; step += gridDim.x) {
        const int64_t out = step / steps;
        const int group = static_cast<int>(step % steps) * THREADS * AHEAD + threadIdx.x;
        const unsigned char *from = codes + ((p.first_out + out) * p.groups + p.first_group) * K * CODE;
        const float scale = static_cast<float>(scales[p.first_out + out]);
        Codes c[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; ++a)
            if (const int j = group + a * THREADS; j < p.part_groups) {
                if constexpr (K == 3 || K > 4)
                    for (int k = 0; k < K; ++k) c[a].code[k] = from[j * K + k];
                else c[a].vector = __ldcs(reinterpret_cast<const Vector *>(from) + j);
            }
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            const int j = group + a * THREADS;
            if (j >= p.part_groups) break;
            float sum[8] = {};
#pragma unroll
            for (int k = 0; k < K; ++k) {
                const int entry = k * p.entries + (c[a].code[k] & (p.entries - 1));
                uint4 words[WORDS];
#pragma unroll
                for (int i = 0; i < WORDS; ++i)
                    words[i] =
                        CODE == 1 ? copies[(entry * WORDS + i) * COPIES + copy] : __ldg(books + entry * WORDS + i);
                add_entry<B>(sum, words);
            }
            uint4 result;
#pragma unroll
            for (int i = 0; i < 4; ++i)
                reinterpret_cast<typename Pair<T>::type *>(&result)[i] =
                    Pair<T>::from_floats(sum[2 * i] * scale, sum[2 * i + 1] * scale);
            __stcs(rows + out * p.part_groups + j, result);
        }
    }
}

/* Every format and mix of dtypes: a thread decodes one group of one output. */
__global__ void plain_kernel(void *rows, const aqlm_dtype row_dtype, const aqlm_weight w, const Part p) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= p.outs * p.part_groups) return;
    const int64_t o = p.first_out + index / p.part_groups, j = p.first_group + index % p.part_groups;
    const int64_t g = w.shape.in_group_size, og = w.shape.out_group_size;
    const float scale = load_float(w.scales, o / og, w.dtype);
    for (int i = 0; i < g; ++i) store_float(rows, index * g + i, row_dtype, weight_at(w, o / og, o % og, j, i) * scale);
}

template <class T, class B, int K, int CODE>
cudaError_t launch(void *rows, const aqlm_weight &w, const Part &p, const Device &device, cudaStream_t stream,
                   bool &possible) {
    const int64_t memory = CODE == 1 ? int64_t{8} * K * p.entries * COPIES_OF<B, K> * sizeof(B) : 0;
    possible = memory <= device.shared_memory;
    if (!possible) return cudaSuccess;
    if (const cudaError_t error = allow_shared_memory<decode_kernel<T, B, K, CODE>>(device)) return error;
    const int64_t resident = memory > 0 ? std::max<int64_t>(1, std::min<int64_t>(4, 220 * 1024 / memory)) : 4;
    const int64_t steps = divide_up(p.part_groups, THREADS * AHEAD) * p.outs;
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(steps, device.sms * resident));
    decode_kernel<T, B, K, CODE><<<blocks, THREADS, memory, stream>>>(
        static_cast<uint4 *>(rows), static_cast<const unsigned char *>(w.codes),
        static_cast<const uint4 *>(w.codebooks), static_cast<const B *>(w.scales), p);
    return cudaGetLastError();
}

template <class T, class B>
cudaError_t run(void *rows, const aqlm_weight &w, const Part &p, const Device &device, cudaStream_t stream,
                bool &possible) {
    if (w.shape.in_group_size != 8 || w.shape.out_group_size != 1) return cudaSuccess;
    if (w.shape.nbits_per_codebook <= 8) switch (w.shape.num_codebooks) {
        case 1: return launch<T, B, 1, 1>(rows, w, p, device, stream, possible);
        case 2: return launch<T, B, 2, 1>(rows, w, p, device, stream, possible);
        case 3: return launch<T, B, 3, 1>(rows, w, p, device, stream, possible);
        case 4: return launch<T, B, 4, 1>(rows, w, p, device, stream, possible);
        case 6: return launch<T, B, 6, 1>(rows, w, p, device, stream, possible);
        case 8: return launch<T, B, 8, 1>(rows, w, p, device, stream, possible);
        }
    else switch (w.shape.num_codebooks) {
        case 1: return launch<T, B, 1, 2>(rows, w, p, device, stream, possible);
        case 2: return launch<T, B, 2, 2>(rows, w, p, device, stream, possible);
        }
    return cudaSuccess;
}

/* By the fast kernel: of rows of 16 bits, from codebooks of their dtype or, while these are trained, of float32. */
template <class T>
cudaError_t run_from(void *rows, aqlm_dtype row_dtype, const aqlm_weight &w, const Part &p, const Device &device,
                     cudaStream_t stream, bool &possible) {
    if (w.dtype == row_dtype) return run<T, T>(rows, w, p, device, stream, possible);
    if (w.dtype == AQLM_F32) return run<T, float>(rows, w, p, device, stream, possible);
    return cudaSuccess;
}

} // namespace
} // namespace aqlm_cuda

extern "C" cudaError_t aqlm_cuda_decode_rows(void *rows, aqlm_dtype row_dtype, const aqlm_weight *w, int64_t first_out,
                                             int64_t outs, int64_t first_group, int64_t groups, cudaStream_t stream) {
    using namespace aqlm_cuda;
    if (outs == 0 || groups == 0) return cudaSuccess;
    Device device;
    if (const cudaError_t error = current_device(device)) return error;
    const Part p = {first_out,
                    outs,
                    static_cast<int>(w->shape.in_features / w->shape.in_group_size),
                    static_cast<int>(first_group),
                    static_cast<int>(groups),
                    1 << w->shape.nbits_per_codebook};
    bool possible = false;
    cudaError_t error = cudaSuccess;
    if (row_dtype == AQLM_F16) error = run_from<__half>(rows, row_dtype, *w, p, device, stream, possible);
    if (row_dtype == AQLM_BF16) error = run_from<__nv_bfloat16>(rows, row_dtype, *w, p, device, stream, possible);
    if (possible || error) return error;
    const auto blocks = static_cast<unsigned>(divide_up(outs * groups, 256));
    plain_kernel<<<blocks, 256, 0, stream>>>(rows, row_dtype, *w, p);
    return cudaGetLastError();
}
