/* Proxes in one pass over memory. REAL is float or double, given by -DREAL=...

   A comparison with NaN is false; the operands stand such that NaN comes through. */
#include <float.h>
#include <stddef.h>
#include <tgmath.h>

#define LARGEST (sizeof(REAL) == sizeof(float) ? (REAL)FLT_MAX : (REAL)DBL_MAX)
#define TINIEST (sizeof(REAL) == sizeof(float) ? (REAL)FLT_MIN : (REAL)DBL_MIN)
#define EPSILON (sizeof(REAL) == sizeof(float) ? FLT_EPSILON : DBL_EPSILON)
#define SAFE 1e-9 /* squares between this and its inverse are summed in REAL, */
#define CHUNK 256 /* so many at a time */
#define PART 4096 /* entries that stay in the nearest cache with their moments */

static inline REAL soft(REAL w, REAL threshold)
{
    REAL clipped = w < threshold ? w : threshold;
    return w - (clipped > -threshold ? clipped : -threshold);
}

/* L1 (`size`) and ElasticNet (with `ridge`, the L2 part). The step of an entry is
   1 / (sqrt(moment) + eps), or 1 without a moment. Divisions cost more than all the rest. */
static void entries(REAL *restrict w, const REAL *restrict moment, ptrdiff_t count, double size,
                    double ridge, double eps)
{
    const REAL first = size, second = ridge, added = eps, largest = sqrt(LARGEST);
    if (!moment && ridge == 0)
        for (ptrdiff_t i = 0; i < count; i++)
            w[i] = soft(w[i], first);
    else if (!moment)
        for (ptrdiff_t i = 0; i < count; i++)
            w[i] = soft(w[i], first) / (1 + second);
    else if (ridge == 0)
        for (ptrdiff_t i = 0; i < count; i++)
            w[i] = soft(w[i], first / (sqrt(moment[i]) + added));
    else
        for (ptrdiff_t i = 0; i < count; i++) {
            REAL root = sqrt(moment[i]) + added;
            root = root > largest ? largest : root; /* of a moment that has overflowed */
            w[i] = soft(w[i] * root, first) / (root + second);
        }
}

/* The step of an entry in the unit of its weight: size / (sqrt(moment) + eps), at most `most`;
   without a moment `size`. */
static inline REAL step_of(const REAL *moment, ptrdiff_t i, REAL size, REAL eps, REAL most)
{
    const REAL step = moment ? size / (sqrt(moment[i]) + eps) : size;
    return step > most ? most : step;
}

/* MCP for steps below `knee` = gamma * strength, where it turns constant: a firm threshold. */
static void firm(REAL *restrict w, const REAL *restrict moment, ptrdiff_t count, REAL size,
                 REAL knee, REAL eps, REAL most)
{
    for (ptrdiff_t i = 0; i < count; i++) {
        const REAL step = step_of(moment, i, size, eps, most), length = fabs(w[i]);
        REAL left = length - step;
        left = left < 0 ? 0 : left / (1 - step / knee);
        left = length <= knee ? left : length;
        w[i] = w[i] < 0 ? -left : left;
    }
}

/* MCP for a step beyond that: zero up to `size`. */
static void hard(REAL *restrict w, ptrdiff_t count, REAL size)
{
    for (ptrdiff_t i = 0; i < count; i++)
        w[i] = fabs(w[i]) <= size ? 0 : w[i];
}

/* SCAD for steps below (a - 1) * strength, where its pieces do not cross. */
static void clipped(REAL *restrict w, const REAL *restrict moment, ptrdiff_t count, REAL size,
                    REAL strength, REAL a, REAL eps, REAL most)
{
    const REAL knee = a * strength, flat = a - 1, whole = flat * strength;
    for (ptrdiff_t i = 0; i < count; i++) {
        const REAL step = step_of(moment, i, size, eps, most), length = fabs(w[i]);
        REAL near = length - step;
        near = near < 0 ? 0 : near;
        const REAL middle = (flat * length - a * step) * strength / (whole - step);
        REAL left = length <= strength + step ? near : middle;
        left = length <= knee ? left : length;
        left = w[i] < 0 ? -left : left;
        w[i] = length <= LARGEST ? left : w[i];
    }
}

/* LogSum: the larger root of a quadratic, zero where there is none. */
static inline REAL larger_root(REAL length, REAL step, REAL epsilon)
{
    const REAL square = (length + epsilon) * (length + epsilon) - 4 * step;
    const REAL root = (length - epsilon + sqrt(square < 0 ? 0 : square)) / 2;
    return root < 0 || !(square >= 0) ? 0 : root;
}

static void log_sum(REAL *restrict w, const REAL *restrict moment, ptrdiff_t count, REAL size,
                    REAL epsilon, REAL eps)
{
    for (ptrdiff_t i = 0; i < count; i++) {
        const REAL length = fabs(w[i]);
        REAL root = larger_root(length, step_of(moment, i, size, eps, LARGEST), epsilon);
        root = w[i] < 0 ? -root : root;
        w[i] = length <= LARGEST ? root : w[i];
    }
}

/* The same where steps may be beyond epsilon^2: the objective then has two minima, and zero is
   taken where it costs less. */
static void log_sum_or_zero(REAL *restrict w, const REAL *restrict moment, ptrdiff_t count,
                            REAL size, REAL epsilon, REAL eps)
{
    for (ptrdiff_t i = 0; i < count; i++) {
        const REAL step = step_of(moment, i, size, eps, LARGEST), length = fabs(w[i]);
        REAL root = larger_root(length, step, epsilon);
        if (step > epsilon * epsilon) {
            const REAL moved = root - length;
            const REAL cost = moved * moved / 2 + step * log1p(root / epsilon);
            root = cost < length * length / 2 ? root : 0;
        }
        if (length <= LARGEST)
            w[i] = w[i] < 0 ? -root : root;
    }
}

/* Entries between two numbers; what is not finite stays. */
static void clamp(REAL *restrict w, ptrdiff_t count, REAL low, REAL high)
{
    for (ptrdiff_t i = 0; i < count; i++) {
        REAL kept = w[i] < low ? low : w[i];
        kept = kept > high ? high : kept;
        w[i] = fabs(w[i]) <= LARGEST ? kept : w[i];
    }
}

/* Norm of a row: short sums in REAL, unless squares overflow or vanish. */
static double norm_of(const REAL *restrict row, ptrdiff_t length)
{
    double square = 0;
    for (ptrdiff_t start = 0; start < length; start += CHUNK) {
        const ptrdiff_t end = start + CHUNK < length ? start + CHUNK : length;
        REAL part = 0;
#pragma omp simd reduction(+ : part)
        for (ptrdiff_t j = start; j < end; j++)
            part += row[j] * row[j];
        square += part;
    }
    if (square > SAFE && square < 1 / SAFE)
        return sqrt(square);
    square = 0;
    for (ptrdiff_t j = 0; j < length; j++)
        square += (double)row[j] * row[j];
    return sqrt(square);
}

/* A row times max(0, 1 - size/|row|). */
static void shrink(REAL *restrict row, ptrdiff_t length, double size)
{
    const double norm = norm_of(row, length);
    const REAL kept = norm <= size ? 0 : 1 - size / norm;
    for (ptrdiff_t j = 0; j < length; j++)
        row[j] *= kept;
}

/* Root t of |row / (t + steps)| = 1, or 0 if there is none above 0: Newton's method on
   1/|row / (t + steps)|, which is concave and increasing, so that from the second iterate on it
   rises to the root. */
static double norm_after(const REAL *restrict row, const REAL *restrict steps, ptrdiff_t length,
                         double start)
{
    double t = start > 0 ? start : 0;
    for (int i = 0; i < 60; i++) {
        const REAL now = t;
        double square = 0, slope = 0;
#pragma omp simd reduction(+ : square, slope)
        for (ptrdiff_t j = 0; j < length; j++) {
            REAL inverse = 1 / (now + steps[j]);
            double ratio = row[j] * inverse;
            square += ratio * ratio;
            slope += ratio * ratio * inverse;
        }
        if (square == 0)
            return 0;
        double before = t, change = (sqrt(square) - 1) * square / slope;
        t = t + change < 0 ? 0 : t + change;
        if (!(fabs(t - before) > 0.01 * sqrt(EPSILON) * t))
            break;
    }
    return t;
}

/* The same where the step of an entry is 1 / (sqrt(moment) + eps); `steps` is room for them.
   For small steps the root is |row| - mean, the mean of the steps under row^2/|row|^2: the next
   term of the series is 3/2 variance/|row|. */
static void shrink_in_metric(REAL *restrict row, const REAL *restrict moment, ptrdiff_t length,
                             REAL size, REAL eps, REAL *restrict steps)
{
    double square = 0, moved = 0, spread = 0;
    REAL largest = 0;
    for (ptrdiff_t start = 0; start < length; start += CHUNK) {
        const ptrdiff_t end = start + CHUNK < length ? start + CHUNK : length;
        REAL squares = 0, moves = 0, spreads = 0;
#pragma omp simd reduction(+ : squares, moves, spreads) reduction(max : largest)
        for (ptrdiff_t j = start; j < end; j++) {
            REAL step = size / (sqrt(moment[j]) + eps);
            step = step < TINIEST ? TINIEST : step;
            step = step > LARGEST ? LARGEST : step;
            steps[j] = step;
            const REAL squared = row[j] * row[j], weighed = squared * step;
            squares += squared;
            moves += weighed;
            spreads += weighed * step;
            largest = step > largest ? step : largest;
        }
        square += squares;
        moved += moves;
        spread += spreads;
    }
    double root;
    if (!(square > SAFE && square + spread < 1 / SAFE))
        root = norm_after(row, steps, length, norm_of(row, length));
    else {
        root = sqrt(square) - moved / square;
        if (!(12 * spread <= EPSILON * square * square))
            root = norm_after(row, steps, length, root);
    }
    const REAL t = root, inverse = 1 / root;
    if (largest < 0.5 * cbrt(EPSILON) * root) /* s/(t + s) = r - r^2 + r^3, r = s/t */
        for (ptrdiff_t j = 0; j < length; j++) {
            const REAL ratio = steps[j] * inverse;
            row[j] -= row[j] * (ratio - ratio * ratio);
        }
    else
        for (ptrdiff_t j = 0; j < length; j++)
            row[j] -= row[j] * (steps[j] / (t + steps[j]));
}

static REAL smallest_of(const REAL *restrict moment, ptrdiff_t count)
{
    REAL smallest = LARGEST;
#pragma omp simd reduction(min : smallest)
    for (ptrdiff_t i = 0; i < count; i++)
        smallest = moment[i] < smallest ? moment[i] : smallest;
    return smallest;
}

/* Entries at least `least`, for the next step; written only where some are below. */
static void lift(REAL *restrict moment, ptrdiff_t count, REAL least)
{
    if (smallest_of(moment, count) < least)
        for (ptrdiff_t i = 0; i < count; i++)
            moment[i] = moment[i] < least ? least : moment[i];
}

enum kind { ENTRIES, ROWS, FIRM, HARD, CLIPPED, LOG_SUM, CLAMP };

/* One prox in place. `length` is that of a row of GroupLasso, 0 for single entries; `first` and
   `second` are the numbers that its kind takes beside `size`; no step is longer than `most`; a
   moment is lifted to `least` while it lies in the cache. */
struct job {
    REAL *w, *moment;
    ptrdiff_t count, length, kind;
    double size, first, second, eps, most, least;
};

static void part(const struct job *job, REAL *w, REAL *moment, ptrdiff_t count, REAL *room)
{
    const REAL size = job->size, eps = job->eps;
    const REAL most = job->most < LARGEST ? job->most : LARGEST;
    switch ((enum kind)job->kind) {
    case ENTRIES:
        entries(w, moment, count, job->size, job->first, job->eps);
        break;
    case ROWS:
        if (job->first > 0)
            entries(w, moment, count, job->first, 0, job->eps);
        if (moment)
            shrink_in_metric(w, moment, count, size, eps, room);
        else
            shrink(w, count, job->size);
        break;
    case FIRM:
        if (moment)
            firm(w, moment, count, size, job->first, eps, most);
        else
            firm(w, NULL, count, size, job->first, eps, most);
        break;
    case HARD:
        hard(w, count, size);
        break;
    case CLIPPED:
        if (moment)
            clipped(w, moment, count, size, job->first, job->second, eps, most);
        else
            clipped(w, NULL, count, size, job->first, job->second, eps, most);
        break;
    case LOG_SUM: {
        const REAL epsilon = job->first, least = moment ? smallest_of(moment, count) : 0;
        if (step_of(moment ? &least : NULL, 0, size, eps, LARGEST) > epsilon * epsilon)
            log_sum_or_zero(w, moment, count, size, epsilon, eps);
        else if (moment)
            log_sum(w, moment, count, size, epsilon, eps);
        else
            log_sum(w, NULL, count, size, epsilon, eps);
        break;
    }
    case CLAMP:
        clamp(w, count, job->first, job->second);
    }
}

/* The jobs one after another; `room` holds the longest row. */
void run(const struct job *jobs, ptrdiff_t count, REAL *room)
{
    for (const struct job *job = jobs; job < jobs + count; job++) {
        const ptrdiff_t each = job->length ? job->length : PART;
        for (ptrdiff_t i = 0; i < job->count; i += each) {
            const ptrdiff_t size = each < job->count - i ? each : job->count - i;
            REAL *moment = job->moment ? job->moment + i : NULL;
            part(job, job->w + i, moment, size, room);
            if (moment && job->least > 0)
                lift(moment, size, job->least);
        }
    }
}
