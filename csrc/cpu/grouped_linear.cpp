// Rows grouped by expert times the expert's matrix. The threads take blocks of the products as they come, each block one
// matrix product on one thread: a barrier a call instead of one an expert, and a thread that is held up holds up nothing.
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <vector>

#include "ops.h"

namespace megamf {

namespace {

// Rows of one product: enough to make packing the expert's matrix cheap, few enough to share out.
constexpr int64_t kBlockRows = 256;

// Rows [begin, end) of expert e; for the gradient of the weights, rows [begin, end) of its matrix.
struct Block {
  int64_t e, begin, end;
};

// first[e] .. first[e + 1] are the rows of expert e.
std::vector<int64_t> first_rows(const at::Tensor& count_L, int64_t L, int64_t R) {
  TORCH_CHECK_VALUE(count_L.dim() == 1 && count_L.size(0) == L && count_L.scalar_type() == at::kLong, "count_L is ",
                    count_L.scalar_type(), " of shape ", count_L.sizes(), ", expected int64 [", L, "]");
  const at::Tensor count = count_L.contiguous();
  const int64_t* rows = count.const_data_ptr<int64_t>();
  std::vector<int64_t> first(L + 1);
  for (int64_t e = 0; e < L; ++e) {
    TORCH_CHECK_VALUE(rows[e] >= 0, "count_L holds ", rows[e], ", expected counts");
    first[e + 1] = first[e] + rows[e];
  }
  TORCH_CHECK_VALUE(first.back() == R, "the counts sum to ", first.back(), ", expected the ", R, " rows of x");
  return first;
}

// Cuts [begin, end) into equal blocks of about kBlockRows.
void cut(int64_t e, int64_t begin, int64_t end, std::vector<Block>& blocks) {
  const int64_t parts = (end - begin + kBlockRows - 1) / kBlockRows;
  for (int64_t p = 0; p < parts; ++p)
    blocks.push_back({e, begin + (end - begin) * p / parts, begin + (end - begin) * (p + 1) / parts});
}

// Calls work(block) for every block; whichever thread is free takes the next. Every block has its own output, and is
// computed on one thread alone: the result does not depend on who takes it.
void share_out(const std::vector<Block>& blocks, const std::function<void(const Block&)>& work) {
  std::atomic<size_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), static_cast<int64_t>(blocks.size())), 1, [&](int64_t, int64_t) {
    // Worker threads do not inherit that autograd is already dealt with.
    const at::NoGradGuard no_grad;
    const c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset_with_ADInplaceOrView);
    for (size_t n = next++; n < blocks.size(); n = next++) work(blocks[n]);
  });
}

}  // namespace

// y[rows of e] = x[rows of e] w[e]
at::Tensor expert_products_cpu(const at::Tensor& x_RD, const at::Tensor& w_LDF, const at::Tensor& count_L) {
  TORCH_CHECK_VALUE(x_RD.dim() == 2 && w_LDF.dim() == 3 && x_RD.size(1) == w_LDF.size(1), "x is ", x_RD.sizes(), " and w ",
                    w_LDF.sizes(), ", expected [R, D] and [L, D, F]");
  const std::vector<int64_t> first = first_rows(count_L, w_LDF.size(0), x_RD.size(0));
  std::vector<Block> blocks;
  for (int64_t e = 0; e < w_LDF.size(0); ++e) cut(e, first[e], first[e + 1], blocks);
  at::Tensor y_RF = at::empty({x_RD.size(0), w_LDF.size(2)}, x_RD.options());
  share_out(blocks, [&](const Block& b) {
    at::Tensor y = y_RF.narrow(0, b.begin, b.end - b.begin);
    at::mm_out(y, x_RD.narrow(0, b.begin, b.end - b.begin), w_LDF.select(0, b.e));
  });
  return y_RF;
}

// out[e] = x[rows of e]^T grad[rows of e]; 0 without rows.
at::Tensor expert_outer_products_cpu(const at::Tensor& x_RD, const at::Tensor& grad_RF, const at::Tensor& count_L) {
  TORCH_CHECK_VALUE(x_RD.dim() == 2 && grad_RF.dim() == 2 && x_RD.size(0) == grad_RF.size(0), "x is ", x_RD.sizes(),
                    " and grad ", grad_RF.sizes(), ", expected [R, D] and [R, F]");
  const int64_t L = count_L.numel(), D = x_RD.size(1);
  const std::vector<int64_t> first = first_rows(count_L, L, x_RD.size(0));
  std::vector<Block> blocks;
  for (int64_t e = 0; e < L; ++e) cut(e, 0, D, blocks);
  at::Tensor out_LDF = at::empty({L, D, grad_RF.size(1)}, x_RD.options());
  share_out(blocks, [&](const Block& b) {
    const int64_t rows = first[b.e + 1] - first[b.e];
    at::Tensor out = out_LDF.select(0, b.e).narrow(0, b.begin, b.end - b.begin);
    const at::Tensor x_dR = x_RD.narrow(0, first[b.e], rows).narrow(1, b.begin, b.end - b.begin).t();
    at::mm_out(out, x_dR, grad_RF.narrow(0, first[b.e], rows));
  });
  return out_LDF;
}

}  // namespace megamf
