// The AdamW step, written once over lanes. Each cpu_adam_<isa>.cc defines its `Lanes` and then includes this
// file in its unnamed namespace and target region, so that the same text is compiled for its instructions.
// The file has no guard and includes nothing: it is a part of whoever includes it.
//
// Lanes has `Floats`, a register of kWidth float32; load, store, stream, broadcast and prefetch; add,
// subtract, multiply, divide and square_root, each rounded once; and multiply_add(a, b, c), a * b + c rounded
// once. For 8-bit moments it has `Ints`, as many 32-bit integers: load_codes, store_codes and maximum; lookup
// in a DynamicMap, and codes_of, its inverse for numbers in [-1, 1]. magnitude_bits and largest_of are free.

// The scalars of a step in registers, and what they do to kWidth elements.
struct Update {
  using Floats = Lanes::Floats;

  explicit Update(const Step& step)
      : starts_from_grad(step.exp_avg_weight >= 0.5f),
        grad_scale(Lanes::broadcast(step.grad_scale)),
        decay(Lanes::broadcast(step.decay)),
        exp_avg_weight(Lanes::broadcast(starts_from_grad ? step.exp_avg_weight - 1 : step.exp_avg_weight)),
        exp_avg_sq_decay(Lanes::broadcast(step.exp_avg_sq_decay)),
        exp_avg_sq_weight(Lanes::broadcast(step.exp_avg_sq_weight)),
        bias_correction2_sqrt(Lanes::broadcast(step.bias_correction2_sqrt)),
        eps(Lanes::broadcast(step.eps)),
        step_size(Lanes::broadcast(step.step_size)) {}

  void operator()(Floats grad, Floats& master, Floats& exp_avg, Floats& exp_avg_sq) const {
    grad = Lanes::multiply(grad, grad_scale);
    const Floats nearer = starts_from_grad ? grad : exp_avg;  // where torch.lerp starts
    exp_avg = Lanes::multiply_add(exp_avg_weight, Lanes::subtract(grad, exp_avg), nearer);
    exp_avg_sq = Lanes::multiply_add(Lanes::multiply(exp_avg_sq_weight, grad), grad,
                                     Lanes::multiply(exp_avg_sq, exp_avg_sq_decay));
    const Floats root = Lanes::square_root(exp_avg_sq);
    const Floats denominator = Lanes::add(Lanes::divide(root, bias_correction2_sqrt), eps);
    const Floats change = Lanes::divide(Lanes::multiply(step_size, exp_avg), denominator);
    master = Lanes::add(Lanes::multiply(master, decay), change);
  }

  bool starts_from_grad;
  Floats grad_scale, decay, exp_avg_weight, exp_avg_sq_decay, exp_avg_sq_weight, bias_correction2_sqrt, eps,
      step_size;
};

// Where a parameter's next elements lie; Weight is void where the master alone is wanted.
template <typename Grad, typename Moment, typename Weight>
struct Position {
  const Grad* grad;
  float* master;
  Moment* exp_avg;
  Moment* exp_avg_sq;
  Weight* weight;

  void advance(std::size_t count) {
    grad += count;
    master += count;
    exp_avg += count;
    exp_avg_sq += count;
    if constexpr (!std::is_void_v<Weight>) weight += count;
  }
};

template <typename Grad, typename Moment, typename Weight>
inline void step_lanes(const Update& update, const Position<Grad, Moment, Weight>& at,
                       bool streaming_stores) {
  Lanes::Floats master = Lanes::load(at.master);
  Lanes::Floats exp_avg = Lanes::load(at.exp_avg);
  Lanes::Floats exp_avg_sq = Lanes::load(at.exp_avg_sq);
  update(Lanes::load(at.grad), master, exp_avg, exp_avg_sq);
  Lanes::store(at.master, master);
  Lanes::store(at.exp_avg, exp_avg);
  Lanes::store(at.exp_avg_sq, exp_avg_sq);
  if constexpr (!std::is_void_v<Weight>) {
    if (streaming_stores) {
      Lanes::stream(at.weight, master);
    } else {
      Lanes::store(at.weight, master);
    }
  }
}

// Fewer than kWidth elements go through a vector of their own, filled up with zeros.
template <typename Grad, typename Moment, typename Weight>
void step_rest(const Update& update, const Position<Grad, Moment, Weight>& at, std::size_t count) {
  std::array<Grad, Lanes::kWidth> grad{};
  std::array<float, Lanes::kWidth> master{};
  std::array<Moment, Lanes::kWidth> exp_avg{}, exp_avg_sq{};
  std::array<std::conditional_t<std::is_void_v<Weight>, char, Weight>, Lanes::kWidth> weight{};
  std::copy_n(at.grad, count, grad.begin());
  std::copy_n(at.master, count, master.begin());
  std::copy_n(at.exp_avg, count, exp_avg.begin());
  std::copy_n(at.exp_avg_sq, count, exp_avg_sq.begin());
  step_lanes<Grad, Moment, Weight>(
      update, {grad.data(), master.data(), exp_avg.data(), exp_avg_sq.data(), weight.data()}, false);
  std::copy_n(master.begin(), count, at.master);
  std::copy_n(exp_avg.begin(), count, at.exp_avg);
  std::copy_n(exp_avg_sq.begin(), count, at.exp_avg_sq);
  if constexpr (!std::is_void_v<Weight>) std::copy_n(weight.begin(), count, at.weight);
}

// [Note: prefetching]
// Four to five streams are read at once, and the processor's own prefetching stops at each page. Asking for
// every line some way ahead was worth 13 % on a Xeon with huge pages and with small ones; 128 to 1024
// elements did alike. A prefetch past the end asks for nothing that anyone misses, and cannot fault.
constexpr std::size_t kRunElements = 32;  // whole cache lines of every type
constexpr std::size_t kPrefetchElements = 256;

template <typename T>
inline void prefetch_run(const T* from) {
  const auto begin = reinterpret_cast<std::uintptr_t>(from) + kPrefetchElements * sizeof(T);
  for (std::size_t offset = 0; offset < kRunElements * sizeof(T); offset += 64)
    Lanes::prefetch(begin + offset);
}

// Takes the update by value: nothing that is stored can change it, so it stays in registers.
template <typename Grad, typename Moment, typename Weight>
void step_span(const Update update, Position<Grad, Moment, Weight> at, std::size_t count,
               bool streaming_stores) {
  for (; count >= kRunElements; count -= kRunElements) {
    prefetch_run(at.grad);
    prefetch_run(at.master);
    prefetch_run(at.exp_avg);
    prefetch_run(at.exp_avg_sq);
    for (std::size_t i = 0; i < kRunElements; i += Lanes::kWidth) {
      step_lanes(update, at, streaming_stores);
      at.advance(Lanes::kWidth);
    }
  }
  for (; count >= Lanes::kWidth; count -= Lanes::kWidth) {
    step_lanes(update, at, streaming_stores);
    at.advance(Lanes::kWidth);
  }
  if (count > 0) step_rest(update, at, count);
}

// A quant block of moments as float32, filled up with zeros.
using BlockOfMoments = std::array<float, kQuantBlockSize>;

inline void decode_block(const DynamicMap& map, const std::uint8_t* codes, std::size_t count, float absmax,
                         BlockOfMoments& values) {
  std::array<std::uint8_t, kQuantBlockSize> padded;
  if (count < kQuantBlockSize) {
    std::copy_n(codes, count, padded.begin());
    std::fill(padded.begin() + static_cast<std::ptrdiff_t>(count), padded.end(), std::uint8_t{0});
    codes = padded.data();
  }
  const Lanes::Floats scale = Lanes::broadcast(absmax);
  for (std::size_t i = 0; i < kQuantBlockSize; i += Lanes::kWidth) {
    const Lanes::Floats scaled = Lanes::lookup(map, Lanes::load_codes(codes + i));
    Lanes::store(values.data() + i, Lanes::multiply(scaled, scale));
  }
  std::fill(values.begin() + static_cast<std::ptrdiff_t>(count), values.end(), 0.0f);
}

// Returns the absmax.
inline float encode_block(const DynamicMap& map, const BlockOfMoments& values, std::uint8_t* codes,
                          std::size_t count) {
  Lanes::Ints largest = magnitude_bits(Lanes::load(values.data()));
  for (std::size_t i = Lanes::kWidth; i < kQuantBlockSize; i += Lanes::kWidth)
    largest = Lanes::maximum(largest, magnitude_bits(Lanes::load(values.data() + i)));
  const std::uint32_t largest_bits = largest_of(largest);  // NaN has the largest
  const float absmax = std::bit_cast<float>(largest_bits);
  if (largest_bits >= kInfinityBits) {
    std::fill_n(codes, count, static_cast<std::uint8_t>(DynamicMap::kSize - 1));  // 1 times that
    return absmax;
  }
  std::array<std::uint8_t, kQuantBlockSize> padded;
  std::uint8_t* const out = count < kQuantBlockSize ? padded.data() : codes;
  const Lanes::Floats scale = Lanes::broadcast(absmax == 0.0f ? 1.0f : absmax);
  for (std::size_t i = 0; i < kQuantBlockSize; i += Lanes::kWidth) {
    const Lanes::Floats scaled = Lanes::divide(Lanes::load(values.data() + i), scale);
    Lanes::store_codes(out + i, Lanes::codes_of(map, scaled));  // [Note: one comparison]
  }
  if (count < kQuantBlockSize) std::copy_n(padded.begin(), count, codes);
  return absmax;
}

template <typename Grad, typename Weight>
void step_quantized(const Update& update, Position<Grad, float, Weight> at, std::size_t count,
                    const QuantizedMoment& exp_avg, const QuantizedMoment& exp_avg_sq,
                    bool streaming_stores) {
  BlockOfMoments first, second;
  for (std::size_t block = 0; block < exp_avg.absmax.size(); ++block) {
    const std::size_t begin = block * kQuantBlockSize;
    const std::size_t block_count = std::min(count - begin, kQuantBlockSize);
    std::uint8_t* const first_codes = exp_avg.codes.data() + begin;
    std::uint8_t* const second_codes = exp_avg_sq.codes.data() + begin;
    decode_block(*exp_avg.map, first_codes, block_count, exp_avg.absmax[block], first);
    decode_block(*exp_avg_sq.map, second_codes, block_count, exp_avg_sq.absmax[block], second);
    at.exp_avg = first.data();
    at.exp_avg_sq = second.data();
    step_span(update, at, block_count, streaming_stores);
    exp_avg.absmax[block] = encode_block(*exp_avg.map, first, first_codes, block_count);
    exp_avg_sq.absmax[block] = encode_block(*exp_avg_sq.map, second, second_codes, block_count);
    at.advance(block_count);
  }
}

void step_lanes_of(const Parameter& parameter, const Step& step, bool streaming_stores) {
  const Update update(step);
  std::visit(
      [&]<typename Grad, typename Kind, typename Weight>(std::span<const Grad> grad, const Kind& moments,
                                                         const Weight& weight) {
        const auto run = [&]<typename Out>(Out* out) {
          float* const master = parameter.master.data();
          if constexpr (std::is_same_v<Kind, QuantizedMoments>) {
            step_quantized(update, Position<Grad, float, Out>{grad.data(), master, nullptr, nullptr, out},
                           grad.size(), moments.exp_avg, moments.exp_avg_sq, streaming_stores);
          } else {
            step_span(update,
                      Position{grad.data(), master, moments.exp_avg.data(), moments.exp_avg_sq.data(), out},
                      grad.size(), streaming_stores);
          }
        };
        if constexpr (std::is_same_v<Weight, std::monostate>) {
          run(static_cast<void*>(nullptr));
        } else {
          run(weight.data());
        }
      },
      parameter.grad, parameter.moments, parameter.weight);
}
