"""Small sources in every language, and what is mined from them: the matter of tests/dataset/test_definitions.py.

`SAMPLES` maps a file's name to its source and to what is expected: `=== name line`, the query's lines after `? `, then
the document.
"""

PYTHON = '''
import functools


class Shape:
    """A closed figure in the plane.

    Attributes:
        sides: list of lengths
    """

    def perimeter(self):

        """Sum the lengths of all sides.

        >>> Shape([1, 2]).perimeter()
        3
        """

        total = sum(self.sides)  # kept
        return total

    @functools.cache
    @staticmethod
    async def scale(factor, *, around=None): "Grow by a factor."; return Shape(factor * 2)


def outer(x):
    # This is no docstring.
    def inner(y):
        r"""Add a backslash \\ to the number."""
        return str(x + y) + "\\\\"

    return inner


# Halve a number, and
# halve it again.
@functools.cache
def quarter(x):
    half = x / 2
    return half / 2
'''
RUST = """
//! A crate about circles.

/// A circle in the plane.
///
/// # Examples
/// ```
/// Circle::new(1.0)
/// ```
#[derive(Clone)]
#[non_exhaustive]
pub struct Circle<T> {
    radius: T,
}

impl<T: Real> Shape for Circle<T> {
    /// Computes the area of the [`Circle`].
    #[inline]
    fn area(&self) -> T {
        // pi is near enough
        self.radius * self.radius * T::PI
    }
}

#[cfg(test)]
mod tests {
    /// Looks whether circles are round.
    fn is_round() -> bool {
        let circle = Circle { radius: 1.0 };
        circle.area() > 3.0
    }
}

/// Looks whether circles are large.
#[tokio::test]
async fn large() {
    let circle = Circle { radius: 1.0 };
    assert!(circle.area() > 3.0);
}
"""
JAVA = """
package plane;

/**
 * Draws {@link Shape}s on a canvas.
 *
 * <p>It keeps <b>no</b> state.
 *
 * @author nobody
 */
@Singleton
public final class Painter {
    private int strokes; // counts strokes
    public void reset() { strokes = 0; canvas.clear(); }

    /** Fills the inside of a shape with paint. @see nothing */
    @Override
    public int fill(Shape shape) {
        int drops = shape.area() / 2;
        return drops;
    }
}
"""
TYPESCRIPT = """
/** Keeps the open windows of a session. */
@Injectable()
export class Windows<T> {
  /**
   * Closes every window that matches.
   * @param filter which ones
   */
  @Log()
  async close(filter: (w: T) => boolean): Promise<void> {
    await Promise.all(this.all.filter(filter).map((w) => w.close()));
  }
}

// Doubles each number of a list.
export const doubled = (numbers: number[]): number[] => {
  return numbers.map((n) => 2 * n);
};

/** What a window can tell about itself. */
interface Facts {
  title: string;
  width: number;
}
"""
TSX = """
/** Shows a greeting to the reader. */
export function Greeting({ name }: Props) {
  return <p className="big">Hello {name}</p>;
}
"""
JAVASCRIPT = """
/* eslint-disable no-console */

/** Turns a query string into an object. */
module.exports.parse = function (text) {
  return Object.fromEntries(new URLSearchParams(text));
};

class Queue {
  /** Takes the oldest job off the queue. */
  *next() {
    yield this.jobs.shift();
  }
}
"""
SWIFT = """
import Foundation

/// Returns the sum of two vectors.
///
/// - Parameters:
///   - a: one
/// - Returns: the sum
@discardableResult
public func add<T: Numeric>(_ a: [T], _ b: [T]) -> [T] {
    return zip(a, b).map { $0 + $1 }
}

extension Array {
    /// Splits the array into chunks of one size.
    func chunks(of size: Int) -> [[Element]] {
        return stride(from: 0, to: count, by: size).map { Array(self[$0..<Swift.min($0 + size, count)]) }
    }
}
"""
C = """
#include <stdio.h>
int used; /* how many are in use */
int spare(void) { return limit() - used; }

/*
 * Copies a string into a new buffer,
 * which the caller must free.
 * \\param text what to copy
 */
static char *copy(const char *text)
{
    char *new = malloc(strlen(text) + 1);
    return strcpy(new, text);
}

/// A node of a linked list.
typedef struct {
    int value;
    void *next;
} Node;

/* The ends of a list. */
struct ends {
    Node *first, *last;
};
"""
CPP = """
namespace plane::round {

/**
 * @brief A ring between two circles.
 * @tparam T number type
 */
template <typename T>
class Ring : public Shape {
 public:
  //! Measures the area between the two circles.
  T area() const {
    return pi * (outer * outer - inner * inner);
  }
};

// ---------------------------------
// Moves the ring by a vector.
// ---------------------------------
template <typename T>
void Ring<T>::move(const Vector &by) {
  center = center + by;
}

}  // namespace plane::round
"""
OBJC = """
#import "Player.h"

@implementation Player
/**
 Plays a song from a given second on.

 @param song which one
 */
- (BOOL)play:(Song *)song from:(int)second {
    [self.device seek:second];
    return [self.device start:song];
}
@end
"""
GO = """
package queue

// Push appends an item and
// wakes one reader.
func (q *Queue[T]) Push(item T) error {
	q.items = append(q.items, item)
	return q.signal()
}

type (
	// Queue is a list that many may read.
	Queue struct {
		items []int
		mutex sync.Mutex
	}
)

//go:noinline
func helper() int {
	return compute(1) + 2
}
"""
LEAN = """
namespace Plane
section
/-- The distance of two points
is never negative. -/
@[simp] theorem dist_nonneg (p q : Point) : 0 ≤ dist p q := by
  unfold dist

  positivity

/-- The point in the middle of two. -/
noncomputable def middle (p q : Point) : Point where
  x := (p.x + q.x) / 2
  y := (p.y + q.y) / 2
end
end Plane

/-- Points may be added. -/
instance : Add Point where
  add p q := ⟨p.x + q.x, p.y + q.y⟩
"""

SAMPLES = {
    "shape.py": (
        PYTHON,
        r"""
=== Shape 5
? A closed figure in the plane.
class Shape:
    def perimeter(self):
        total = sum(self.sides)  # kept
        return total

    @functools.cache
    @staticmethod
    async def scale(factor, *, around=None): return Shape(factor * 2)
=== Shape.perimeter 12
? Sum the lengths of all sides.
def perimeter(self):
    total = sum(self.sides)  # kept
    return total
=== Shape.scale 23
? Grow by a factor.
@functools.cache
@staticmethod
async def scale(factor, *, around=None): return Shape(factor * 2)
=== outer.inner 30
? Add a backslash \ to the number.
def inner(y):
    return str(x + y) + "\\"
=== quarter 39
? Halve a number, and halve it again.
@functools.cache
def quarter(x):
    half = x / 2
    return half / 2
""",
    ),
    "circle.rs": (
        RUST,
        """
=== Circle 10
? A circle in the plane.
#[derive(Clone)]
#[non_exhaustive]
pub struct Circle<T> {
    radius: T,
}
=== Circle.area 18
? Computes the area of the Circle.
#[inline]
fn area(&self) -> T {
    // pi is near enough
    self.radius * self.radius * T::PI
}
""",
    ),
    "Painter.java": (
        JAVA,
        """
=== Painter 11
? Draws Shapes on a canvas.
? It keeps no state.
@Singleton
public final class Painter {
    private int strokes; // counts strokes
    public void reset() { strokes = 0; canvas.clear(); }

    @Override
    public int fill(Shape shape) {
        int drops = shape.area() / 2;
        return drops;
    }
}
=== Painter.fill 17
? Fills the inside of a shape with paint. @see nothing
@Override
public int fill(Shape shape) {
    int drops = shape.area() / 2;
    return drops;
}
""",
    ),
    "windows.ts": (
        TYPESCRIPT,
        """
=== Windows 3
? Keeps the open windows of a session.
@Injectable()
export class Windows<T> {
  @Log()
  async close(filter: (w: T) => boolean): Promise<void> {
    await Promise.all(this.all.filter(filter).map((w) => w.close()));
  }
}
=== Windows.close 9
? Closes every window that matches.
@Log()
async close(filter: (w: T) => boolean): Promise<void> {
  await Promise.all(this.all.filter(filter).map((w) => w.close()));
}
=== doubled 16
? Doubles each number of a list.
export const doubled = (numbers: number[]): number[] => {
  return numbers.map((n) => 2 * n);
};
=== Facts 21
? What a window can tell about itself.
interface Facts {
  title: string;
  width: number;
}
""",
    ),
    "greeting.tsx": (
        TSX,
        """
=== Greeting 3
? Shows a greeting to the reader.
export function Greeting({ name }: Props) {
  return <p className="big">Hello {name}</p>;
}
""",
    ),
    "query.js": (
        JAVASCRIPT,
        """
=== module.exports.parse 5
? Turns a query string into an object.
module.exports.parse = function (text) {
  return Object.fromEntries(new URLSearchParams(text));
};
=== Queue.next 11
? Takes the oldest job off the queue.
*next() {
  yield this.jobs.shift();
}
""",
    ),
    "vector.swift": (
        SWIFT,
        """
=== add 9
? Returns the sum of two vectors.
@discardableResult
public func add<T: Numeric>(_ a: [T], _ b: [T]) -> [T] {
    return zip(a, b).map { $0 + $1 }
}
=== Array.chunks 16
? Splits the array into chunks of one size.
func chunks(of size: Int) -> [[Element]] {
    return stride(from: 0, to: count, by: size).map { Array(self[$0..<Swift.min($0 + size, count)]) }
}
""",
    ),
    "copy.c": (
        C,
        """
=== copy 11
? Copies a string into a new buffer, which the caller must free.
static char *copy(const char *text)
{
    char *new = malloc(strlen(text) + 1);
    return strcpy(new, text);
}
=== Node 18
? A node of a linked list.
typedef struct {
    int value;
    void *next;
} Node;
=== ends 24
? The ends of a list.
struct ends {
    Node *first, *last;
};
""",
    ),
    "ring.h": (
        CPP,
        """
=== plane.round.Ring 8
? A ring between two circles.
template <typename T>
class Ring : public Shape {
 public:
  T area() const {
    return pi * (outer * outer - inner * inner);
  }
};
=== plane.round.Ring.area 12
? Measures the area between the two circles.
T area() const {
  return pi * (outer * outer - inner * inner);
}
=== plane.round.Ring.move 20
? Moves the ring by a vector.
template <typename T>
void Ring<T>::move(const Vector &by) {
  center = center + by;
}
""",
    ),
    "Player.m": (
        OBJC,
        """
=== Player.play:from: 10
? Plays a song from a given second on.
- (BOOL)play:(Song *)song from:(int)second {
    [self.device seek:second];
    return [self.device start:song];
}
""",
    ),
    "queue.go": (
        GO,
        """
=== Queue.Push 6
? Push appends an item and wakes one reader.
func (q *Queue[T]) Push(item T) error {
	q.items = append(q.items, item)
	return q.signal()
}
=== Queue 13
? Queue is a list that many may read.
Queue struct {
	items []int
	mutex sync.Mutex
}
""",
    ),
    "Plane.lean": (
        LEAN,
        """
=== Plane.dist_nonneg 6
? The distance of two points is never negative.
@[simp] theorem dist_nonneg (p q : Point) : 0 ≤ dist p q := by
  unfold dist

  positivity
=== Plane.middle 12
? The point in the middle of two.
noncomputable def middle (p q : Point) : Point where
  x := (p.x + q.x) / 2
  y := (p.y + q.y) / 2
=== instance 19
? Points may be added.
instance : Add Point where
  add p q := ⟨p.x + q.x, p.y + q.y⟩
""",
    ),
}


def expected(text: str) -> list[tuple[str, int, str, str]]:
    """(name, line, query, document) of every pair."""
    pairs = []
    for block in text.strip().split("=== ")[1:]:
        head, *lines = block.rstrip().split("\n")
        name, line = head.rsplit(" ", 1)
        query = [entry.removeprefix("? ") for entry in lines if entry.startswith("? ")]
        pairs.append((name, int(line), "\n".join(query), "\n".join(lines[len(query) :])))
    return pairs
