// A decoder layer's new position of each sequence, by one team of threads that meets five times. Between two meetings they
// take tiles until there are none left: who is held up, by another process for instance, takes fewer.
//
// What is small (norms, residuals and, for one row, the activations' tables) every thread makes for itself: a copy of
// its own costs less than to wait for another thread's and to read it from that core's cache.
#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "anybits.h"
#include "dispatch.h"
#include "product.h"
#include "step_kernels.h"
#include "threads.h"

namespace {

constexpr int MATRICES = 7;
constexpr int64_t PIECE_COLUMNS = 32768;  // tiles that a thread takes at once have at least this many columns together
enum { QUERY, KEY, VALUE, OUTPUT, GATE, UP, DOWN };

thread_local Memory memory;

const uint16_t *halves(const void *p) { return static_cast<const uint16_t *>(p); }

// A layer, its products and where its numbers lie.
struct Layer {
    const ab_layer &l;
    const ab_place &place;
    const StepKernels &step;
    const uint16_t *x;
    uint16_t *y;
    int64_t rows;
    Product products[MATRICES];
    const uint16_t *biases[MATRICES];
    uint16_t *made[MATRICES];  // what each matrix gives, [rows, its rows]
    uint16_t *attended;        // [rows, heads * dim]
    int order[AB_MAX_LAYER_ROWS];
    Segment segments[MATRICES];
    Group groups[MATRICES][AB_MAX_LAYER_ROWS];
    AttendCall attention;
    char *threads_memory, *shared_activations;
    size_t activations, scratch, numbers, floats;  // bytes
    mutable Queue queues[MATRICES];
    mutable std::atomic<int64_t> pairs{0};

    Layer(const ab_layer &layer, const ab_place &at, const StepKernels &kernels, const void *from, void *to)
        : l(layer), place(at), step(kernels), x(halves(from)), y(static_cast<uint16_t *>(to)), rows(at.batch) {}
    int plan_product(int which, const ab_matrix &m, int64_t out, int64_t in, int64_t bits);
    int plan();
    size_t shared_bytes() const;
    size_t thread_bytes() const { return 2 * numbers + activations + scratch + floats; }
    void put(char *at, int threads);
};

int Layer::plan_product(int which, const ab_matrix &m, int64_t out, int64_t in, int64_t bits) {
    const int status = blob_check(m.blob, m.blob_bytes);
    if (status != AB_OK) return status;
    const Header *h = header_of(m.blob);
    const Kernels *kernels = kernels_of(h->shape.isa);
    if (!kernels) return AB_BAD_ISA;
    if (h->shape.out_features != out || h->shape.in_features != in) return AB_BAD_SHAPE;
    if (m.precision < 1 || m.precision > AB_MAX_PLANES || !stored(h, static_cast<int>(m.precision))) return AB_BAD_PRECISION;
    segments[which] = {static_cast<int>(m.precision), 0, static_cast<int>(rows)};
    Call &c = products[which].call;
    c.weight = h, c.x = x, c.dtype = AB_BF16, c.x_stride = in, c.rows = static_cast<int>(rows);
    c.order = order, c.segments = segments + which, c.segment_count = 1, c.eight_bits = bits <= 8;
    products[which].plan(kernels, groups[which]);
    biases[which] = halves(m.bias);
    return AB_OK;
}

int Layer::plan() {
    for (int i = 0; i < AB_MAX_LAYER_ROWS; i++) order[i] = i;
    const int64_t all = l.heads * l.dim, kv = l.kv_heads * l.dim;
    const ab_matrix *matrices[MATRICES] = {&l.query, &l.key, &l.value, &l.output, &l.gate, &l.up, &l.down};
    const int64_t out[MATRICES] = {all, kv, kv, l.hidden, l.middle, l.middle, l.hidden};
    const int64_t in[MATRICES] = {l.hidden, l.hidden, l.hidden, all, l.hidden, l.hidden, l.middle};
    activations = scratch = 0;
    for (int i = 0; i < MATRICES; i++) {
        const int status = plan_product(i, *matrices[i], out[i], in[i], l.activation_bits);
        if (status != AB_OK) return status;
        const Product &p = products[i];
        if (p.activation_bytes() > activations) activations = p.activation_bytes();
        if (p.scratch > scratch) scratch = p.scratch;
    }
    AttendCall &c = attention;
    memset(&c, 0, sizeof c);
    c.key = static_cast<uint16_t *>(place.key), c.value = static_cast<uint16_t *>(place.value);
    c.heads = l.heads, c.kv_heads = l.kv_heads, c.length = place.length, c.dim = c.value_dim = l.dim;
    c.query_batch = all, c.key_batch = place.key_batch, c.key_head = place.key_head, c.key_stride = place.key_stride;
    c.value_batch = place.value_batch, c.value_head = place.value_head, c.value_stride = place.value_stride;
    c.cos = halves(place.cos), c.sin = halves(place.sin), c.angle_batch = place.angle_batch;
    c.padded = ceil_div(place.length, 16) * 16, c.scaling = static_cast<float>(l.scaling);
    numbers = lines(rows * l.hidden * 2);
    floats = lines(attend_scratch(l.dim, l.dim, c.padded) * 4);
    return AB_OK;
}

size_t Layer::shared_bytes() const {
    size_t bytes = lines(rows * l.heads * l.dim * 2) + activations;
    for (const Product &p : products) bytes += lines(rows * p.call.weight->shape.out_features * 2);
    return bytes;
}

void Layer::put(char *at, int threads) {
    for (int i = 0; i < MATRICES; i++) {
        made[i] = reinterpret_cast<uint16_t *>(at), products[i].call.y = at;
        at += lines(rows * products[i].call.weight->shape.out_features * 2);
    }
    attended = reinterpret_cast<uint16_t *>(at), at += lines(rows * l.heads * l.dim * 2);
    products[OUTPUT].call.x = attended, products[DOWN].call.x = made[GATE];
    attention.query = made[QUERY], attention.new_key = made[KEY], attention.new_value = made[VALUE], attention.out = attended;
    shared_activations = rows > 1 && threads > 1 ? at : nullptr;
    threads_memory = at + activations;
}

// One thread's way through a layer.
struct Member {
    const Layer &layer;
    int part, parts;
    uint16_t *normed, *middle;  // [rows, hidden]
    char *activations, *scratch;
    float *floats;

    Member(const Layer &of, int index, int count) : layer(of), part(index), parts(count) {
        char *at = of.threads_memory + static_cast<size_t>(index) * of.thread_bytes();
        normed = reinterpret_cast<uint16_t *>(at), middle = reinterpret_cast<uint16_t *>(at + of.numbers);
        activations = at + 2 * of.numbers, scratch = activations + of.activations;
        floats = reinterpret_cast<float *>(scratch + of.scratch);
    }

    void wait() const {
        if (parts > 1) threads_wait();
    }

    void norm(const uint16_t *from, const void *weight, double eps) const {
        const int64_t k = layer.l.hidden;
        for (int64_t r = 0; r < layer.rows; r++)
            layer.step.rms_norm(from + r * k, halves(weight), k, static_cast<float>(eps), normed + r * k);
    }

    // Threads fill their own activations, or each its share of common ones.
    void fill(const Product &p, bool behind_another) const {
        const bool common = layer.shared_activations != nullptr;
        if (common && behind_another) wait();
        p.fill(common ? part : 0, common ? parts : 1, scratch);
        if (common) wait();
    }

    Product placed(int which, const uint16_t *x) const {
        Product p = layer.products[which];
        p.call.x = x;
        p.place(layer.shared_activations ? layer.shared_activations : activations);
        return p;
    }

    // Calls body(first, last) for tiles of products[which] until all are taken.
    template <class F>
    void each_piece(int which, F &&body) const {
        const Product &p = layer.products[which];
        const int64_t least = PIECE_COLUMNS / p.call.weight->shape.in_features + (layer.rows > 1 ? TILE_GROUP : 1);
        int64_t first, last;
        while (layer.queues[which].take(p.tiles(), least, parts, &first, &last)) body(first, last);
    }

    // Products first ... last - 1 of one x.
    void multiply(int first, int last, const uint16_t *x) const {
        for (int i = first; i < last; i++) {
            const Product p = placed(i, x);
            if (i == first || !p.same_activations(placed(i - 1, x))) fill(p, i > first);
            each_piece(i, [&](int64_t a, int64_t b) { p.multiply(a, b, scratch); });
        }
    }

    void add_bias(int which, int64_t row, int64_t first, int64_t count) const {
        if (!layer.biases[which]) return;
        uint16_t *at = layer.made[which] + row * layer.products[which].call.weight->shape.out_features + first;
        layer.step.add(at, layer.biases[which] + first, count, at);
    }

    void attend() const {
        const ab_layer &l = layer.l;
        const int64_t shared = l.heads / l.kv_heads;
        for (int64_t pair; (pair = layer.pairs.fetch_add(1, std::memory_order_relaxed)) < layer.rows * l.kv_heads;) {
            const int64_t row = pair / l.kv_heads, head = pair % l.kv_heads;
            uint16_t *query = layer.made[QUERY] + (row * l.heads + head * shared) * l.dim;
            uint16_t *key = layer.made[KEY] + pair * l.dim;
            add_bias(QUERY, row, head * shared * l.dim, shared * l.dim);
            add_bias(KEY, row, head * l.dim, l.dim);
            add_bias(VALUE, row, head * l.dim, l.dim);
            for (int64_t q = 0; l.query_norm && q < shared; q++)
                layer.step.rms_norm(query + q * l.dim, halves(l.query_norm), l.dim, static_cast<float>(l.query_eps), query + q * l.dim);
            if (l.key_norm) layer.step.rms_norm(key, halves(l.key_norm), l.dim, static_cast<float>(l.key_eps), key);
            layer.step.attend(layer.attention, pair, pair + 1, floats);
        }
    }

    // gate = silu(gate) * up, columns first ... last - 1.
    void activate(int64_t first, int64_t last) const {
        const int64_t n = layer.l.middle;
        for (int64_t r = 0; r < layer.rows && first < last; r++) {
            add_bias(GATE, r, first, last - first), add_bias(UP, r, first, last - first);
            uint16_t *at = layer.made[GATE] + r * n + first;
            layer.step.silu_mul(at, layer.made[UP] + r * n + first, last - first, at);
        }
    }

    // Where both matrices are divided alike, a thread that makes rows of one makes those of the other and joins them.
    void gated(const uint16_t *x) const {
        const Product gate = placed(GATE, x), up = placed(UP, x);
        if (gate.same_activations(up)) {
            fill(gate, false);
            each_piece(GATE, [&](int64_t a, int64_t b) {
                gate.multiply(a, b, scratch), up.multiply(a, b, scratch);
                activate(gate.row_of(a), gate.row_of(b));
            });
        } else {
            multiply(GATE, UP + 1, x);
            wait();
            activate(layer.l.middle * part / parts, layer.l.middle * (part + 1) / parts);
        }
    }

    // to = residual + (made + bias), columns first ... last - 1.
    void add_residual(const uint16_t *residual, int which, int64_t first, int64_t last, uint16_t *to) const {
        const int64_t k = layer.l.hidden;
        for (int64_t r = 0; r < layer.rows && first < last; r++) {
            const uint16_t *added = layer.made[which] + r * k + first;
            if (layer.biases[which]) {
                layer.step.add(added, layer.biases[which] + first, last - first, to + r * k + first);
                added = to + r * k + first;
            }
            layer.step.add(residual + r * k + first, added, last - first, to + r * k + first);
        }
    }

    void run() const {
        const ab_layer &l = layer.l;
        norm(layer.x, l.first_norm, l.first_eps);
        multiply(QUERY, VALUE + 1, normed);
        wait();
        attend();
        wait();
        multiply(OUTPUT, OUTPUT + 1, layer.attended);
        wait();
        add_residual(layer.x, OUTPUT, 0, l.hidden, middle);
        norm(middle, l.second_norm, l.second_eps);
        gated(normed);
        wait();
        multiply(DOWN, DOWN + 1, layer.made[GATE]);
        wait();
        add_residual(middle, DOWN, l.hidden * part / parts, l.hidden * (part + 1) / parts, layer.y);
    }
};

bool fits(const ab_layer &l, const ab_place &p) {
    return p.key && p.value && p.cos && p.sin && p.batch >= 1 && p.batch <= AB_MAX_LAYER_ROWS && p.length >= 1 &&
           l.hidden >= 1 && l.middle >= 1 && l.kv_heads >= 1 && l.heads >= 1 && l.heads % l.kv_heads == 0 && l.dim >= 32 &&
           l.dim % 32 == 0 && l.first_norm && l.second_norm && !l.query_norm == !l.key_norm;
}

}  // namespace

extern "C" int ab_layer_step(int isa, const ab_layer *layer, const ab_place *place, const void *x, void *y, int threads) {
    const StepKernels *step = step_kernels_of(isa);
    if (!step) return AB_BAD_ISA;
    if (!x || !y || !fits(*layer, *place)) return AB_BAD_SHAPE;
    Layer made(*layer, *place, *step, x, y);
    const int status = made.plan();
    if (status != AB_OK) return status;
    if (threads < 1) threads = 1;
    if (!memory.reserve(made.shared_bytes() + made.thread_bytes() * static_cast<size_t>(threads))) return AB_NO_MEMORY;
    made.put(memory.at, threads);
    parallel(threads, [&](int part, int parts) { Member(made, part, parts).run(); });
    return AB_OK;
}
