/**
 * The cut against a simulated device: writers whose data land at some moment between issue and completion, reads that see what
 * is there at some moment, events delivered late and in bursts. Whatever the interleaving, every claimed point must be what the
 * definition says; the naive capture, on the same histories, must not be.
 */
import { describe, expect, it } from 'vitest';
import { IntervalCut } from '../../../src/capture/interval-cut.js';
import { seeded } from '../../support/model-volume.js';

interface Write {
  readonly id: number;
  readonly block: number;
  readonly count: number;
  readonly issueNs: number;
  /** When the data can be read, block by block. */
  readonly landNs: readonly number[];
  readonly doneNs: number;
}

interface Event {
  readonly atNs: number;
  readonly write: Write;
  readonly kind: 'issue' | 'land' | 'done';
  readonly part: number;
}

/** Writers of one history: each writes one after the other, to its own and to shared hot blocks. */
function history(random: () => number, blocks: number, endNs: number): Write[] {
  const writes: Write[] = [];
  const writers = 1 + Math.floor(random() * 4);
  const pauses = [0, 5, 40, 400][Math.floor(random() * 4)] ?? 0;
  const slow = [20, 200, 1500][Math.floor(random() * 3)] ?? 20;
  let clock = 0;
  for (let w = 0; w < writers; w++) {
    let now = 1 + Math.floor(random() * 50);
    while (now < endNs) {
      const count = random() < 0.8 ? 1 : 1 + Math.floor(random() * 5);
      const hot = random() < 0.3;
      const block = Math.floor(random() * (hot ? Math.min(4, blocks) : blocks));
      const n = Math.min(count, blocks - block);
      const issueNs = now;
      const doneNs = issueNs + 2 + Math.floor(random() * slow);
      const landNs = Array.from(
        { length: n },
        () => issueNs + (doneNs - issueNs) * (0.01 + 0.98 * random()),
      );
      writes.push({ id: ++clock, block, count: n, issueNs, landNs, doneNs });
      // The same writer goes on after its write is acknowledged: that is what makes an order.
      now = doneNs + 1 + Math.floor(random() * pauses);
    }
  }
  return writes;
}

function eventsOf(writes: readonly Write[]): Event[] {
  const events: Event[] = [];
  for (const write of writes) {
    events.push({ atNs: write.issueNs, write, kind: 'issue', part: 0 });
    write.landNs.forEach((atNs, part) => events.push({ atNs, write, kind: 'land', part }));
    events.push({ atNs: write.doneNs, write, kind: 'done', part: 0 });
  }
  return events.sort((a, b) => a.atNs - b.atNs);
}

/** A device in simulated time. Events reach the capture only when it polls, out of order, and not the newest ones. */
class Device {
  readonly content: number[];
  nowNs = 0;
  private readonly events: Event[];
  private at = 0;
  private undelivered: Event[] = [];
  private readonly random: () => number;

  constructor(writes: readonly Write[], blocks: number, random: () => number) {
    this.content = Array.from({ length: blocks }, () => 0);
    this.events = eventsOf(writes);
    this.random = random;
  }

  get isOver(): boolean {
    return this.at >= this.events.length;
  }

  pass(ns: number): void {
    this.nowNs += ns;
    for (;;) {
      const e = this.events[this.at];
      if (e === undefined || e.atNs > this.nowNs) break;
      if (e.kind === 'land') this.content[e.write.block + e.part] = e.write.id;
      else this.undelivered.push(e);
      this.at++;
    }
  }

  /** Delivers everything before a moment that is a little ago, shuffled, and perhaps some of what is newer. */
  poll(cut: IntervalCut): void {
    const guard = Math.floor(this.random() * 10);
    const completeNs = this.nowNs - guard;
    const rest: Event[] = [];
    const due: Event[] = [];
    for (const e of this.undelivered)
      (e.atNs < completeNs || this.random() < 0.5 ? due : rest).push(e);
    for (let i = due.length - 1; i > 0; i--) {
      const j = Math.floor(this.random() * (i + 1));
      const [a, b] = [due[i], due[j]];
      if (a !== undefined && b !== undefined) [due[i], due[j]] = [b, a];
    }
    for (const e of due) {
      if (e.kind === 'issue') cut.issued(e.write.block, e.write.count, e.atNs);
      else cut.completed(e.write.block, e.write.count, e.atNs);
    }
    this.undelivered = rest;
    cut.advance(completeNs);
  }
}

/** Why `image` is not a state of the instant `t`; undefined if it is one. */
function wrongAt(
  image: readonly number[],
  t: number,
  writes: readonly Write[],
  byBlock: readonly (readonly Write[])[],
): string | undefined {
  for (let b = 0; b < image.length; b++) {
    const id = image[b] ?? 0;
    const held = id === 0 ? undefined : writes[id - 1];
    if (held !== undefined && held.issueNs > t)
      return `block ${b} holds a write issued ${held.issueNs - t} after the point`;
    const landed = held === undefined ? -1 : (held.landNs[b - held.block] ?? -1);
    for (const w of byBlock[b] ?? []) {
      const land = w.landNs[b - w.block] ?? 0;
      if (w.doneNs < t && land > landed)
        return `block ${b} lacks a write completed ${t - w.doneNs} before the point`;
    }
  }
  return undefined;
}

/** True if the image is a state of no instant at all. */
function isInconsistent(
  image: readonly number[],
  writes: readonly Write[],
  byBlock: readonly (readonly Write[])[],
): boolean {
  let lo = Number.NEGATIVE_INFINITY;
  let hi = Number.POSITIVE_INFINITY;
  image.forEach((id, b) => {
    const held = id === 0 ? undefined : writes[id - 1];
    if (held !== undefined) lo = Math.max(lo, held.issueNs);
    const landed = held === undefined ? -1 : (held.landNs[b - held.block] ?? -1);
    for (const w of byBlock[b] ?? []) {
      if ((w.landNs[b - w.block] ?? 0) > landed) hi = Math.min(hi, w.doneNs);
    }
  });
  return lo > hi;
}

interface Outcome {
  points: number;
  wrong: string | undefined;
  rounds: number;
  naivePoints: number;
  naiveWrong: number;
}

function run(seed: number): Outcome {
  const random = seeded(seed);
  const blocks = 4 + Math.floor(random() * 60);
  const endNs = 3000 + Math.floor(random() * 6000);
  const writes = history(random, blocks, endNs);
  const byBlock = Array.from({ length: blocks }, (_, b) =>
    writes.filter((w) => w.block <= b && b < w.block + w.count),
  );
  const device = new Device(writes, blocks, random);
  // A table of few slots in some histories, so that the coarse times are used too.
  const cut = new IntervalCut(blocks, random() < 0.3 ? 16 : 256);
  const image: number[] = Array.from({ length: blocks }, () => 0);
  const naive = [...image];
  const staged = new Map<number, number>();
  const outcome: Outcome = {
    points: 0,
    wrong: undefined,
    rounds: 0,
    naivePoints: 0,
    naiveWrong: 0,
  };
  const reading = 1 + Math.floor(random() * 30);
  const dirty = new Set<number>();
  let lastNs = -1;
  cut.invalidate(0);

  const readDue = (limitNs: number): void => {
    const taken = cut.take(limitNs, 1 + Math.floor(random() * blocks));
    const late: [number, number][] = [];
    for (const block of taken) {
      device.pass(random() * reading);
      staged.set(block, device.content[block] ?? 0);
      device.pass(random() * 3); // the end of the read is noticed later than the data were taken
      if (random() < 0.5) cut.staged(block, 1, device.nowNs);
      else late.push([block, device.nowNs]);
    }
    for (const [block, at] of late) cut.staged(block, 1, at);
  };

  while (!device.isOver && outcome.wrong === undefined) {
    device.pass(random() * 300);
    device.poll(cut);
    if (!cut.hasChanges) continue;
    // The control reads what is known to have changed, once, and calls that a point.
    for (const e of cut.take(Number.POSITIVE_INFINITY, blocks)) {
      dirty.add(e);
      cut.unread(e, 1);
    }
    let limitNs = device.nowNs;
    for (let round = 1; round <= 25; round++) {
      outcome.rounds++;
      for (let n = 0; n < 4; n++) readDue(limitNs);
      if (round === 1) {
        for (const b of dirty) naive[b] = staged.get(b) ?? device.content[b] ?? 0;
        dirty.clear();
        outcome.naivePoints++;
        if (isInconsistent(naive, writes, byBlock)) outcome.naiveWrong++;
      }
      let decision = cut.decide();
      while (decision.kind === 'wait') {
        device.pass(1 + random() * 10);
        device.poll(cut);
        decision = cut.decide();
      }
      if (decision.kind === 'holds') {
        const t = cut.claim();
        for (const [b, id] of staged) image[b] = id;
        staged.clear();
        outcome.points++;
        outcome.wrong =
          wrongAt(image, t, writes, byBlock) ??
          (t < lastNs ? `the point before was at ${lastNs}` : undefined);
        lastNs = t;
        if (outcome.wrong !== undefined)
          outcome.wrong += ` (seed ${seed}, point ${outcome.points} at ${t})`;
        break;
      }
      limitNs = decision.loNs;
    }
  }
  if (cut.lateCompletions > 0) outcome.wrong ??= `late completions (seed ${seed})`;
  return outcome;
}

describe('interval cut', () => {
  it('claims only what the definition of a point allows, in thousands of histories; the naive capture does not', () => {
    const total = { points: 0, rounds: 0, naivePoints: 0, naiveWrong: 0 };
    for (let seed = 1; seed <= 3000; seed++) {
      const o = run(seed);
      expect(o.wrong).toBeUndefined();
      total.points += o.points;
      total.rounds += o.rounds;
      total.naivePoints += o.naivePoints;
      total.naiveWrong += o.naiveWrong;
    }
    process.stderr.write(`interval cut: ${JSON.stringify(total)}\n`);
    expect(total.points).toBeGreaterThan(3000);
    expect(total.naiveWrong).toBeGreaterThan(total.naivePoints / 50);
  }, 120_000);

  it('claims a point as late as the events are known, and before what was not read', () => {
    const cut = new IntervalCut(100);
    cut.issued(5, 1, 100);
    cut.completed(5, 1, 200);
    cut.advance(300);
    expect([...cut.take(300, 10)]).toEqual([5]);
    cut.staged(5, 1, 350);
    expect(cut.decide()).toEqual({ kind: 'wait' });
    cut.issued(7, 1, 310);
    cut.completed(7, 1, 400);
    cut.advance(500);
    expect(cut.decide()).toEqual({ kind: 'holds', loNs: 100, hiNs: 400, instantNs: 400 });
    expect(cut.claim()).toBe(400);
    expect(cut.pendingBlocks).toBe(1);
    expect([...cut.take(500, 10)]).toEqual([7]);
    cut.staged(7, 1, 600);
    cut.advance(700);
    expect(cut.decide()).toEqual({
      kind: 'holds',
      loNs: Number.NEGATIVE_INFINITY,
      hiNs: Number.POSITIVE_INFINITY,
      instantNs: 700,
    });
  });

  it('asks for another round where a block read holds a write issued after one that is missing completed', () => {
    const cut = new IntervalCut(100);
    cut.completed(1, 1, 100);
    cut.advance(100);
    cut.take(100, 10);
    // Block 2 is written and acknowledged, then block 1; the read of 1 sees the second write.
    cut.issued(2, 1, 110);
    cut.completed(2, 1, 120);
    cut.issued(1, 1, 130);
    cut.staged(1, 1, 150);
    cut.completed(1, 1, 160);
    cut.advance(200);
    expect(cut.decide()).toEqual({ kind: 'again', loNs: 130, hiNs: 120 });
    expect([...cut.take(130, 10)]).toEqual([2]);
    cut.staged(2, 1, 210);
    cut.advance(220);
    expect(cut.decide()).toMatchObject({ kind: 'holds', instantNs: 160 });
  });

  it('decides nothing on equal times', () => {
    const cut = new IntervalCut(10);
    cut.completed(1, 1, 5);
    cut.take(5, 10);
    cut.issued(1, 1, 10);
    cut.staged(1, 1, 20);
    cut.completed(2, 1, 10);
    cut.advance(30);
    expect(cut.decide()).toEqual({ kind: 'again', loNs: 10, hiNs: 10 });
  });

  it('after track was lost, claims nothing until every block was read', () => {
    const cut = new IntervalCut(3000);
    cut.invalidate(1000);
    const first = cut.take(2000, 1000);
    expect(first.length).toBeGreaterThanOrEqual(1000);
    for (const b of first) cut.staged(b, 1, 1100);
    cut.advance(1200);
    expect(cut.decide().kind).toBe('again');
    for (;;) {
      const more = cut.take(2000, 1000);
      if (more.length === 0) break;
      for (const b of more) cut.staged(b, 1, 1300);
    }
    expect(cut.decide().kind).toBe('wait');
    cut.advance(1400);
    expect(cut.decide()).toMatchObject({ kind: 'holds', loNs: 1000, instantNs: 1400 });
  });

  it('takes unknown blocks in runs, and counts what was issued to them while they were read', () => {
    const cut = new IntervalCut(5000);
    cut.invalidate(10);
    expect(cut.unknownBlocks).toBe(5000);
    const first = cut.nextRun(0, 3000);
    expect(first).toEqual({ block: 0, count: 2048 });
    cut.takeRun(0, 2048);
    expect(cut.unknownBlocks).toBe(2952);
    // Block 3000 is read, written and acknowledged; then block 5, which is read after that.
    const rest = cut.nextRun(2048, 3000);
    expect(rest).toEqual({ block: 2048, count: 2048 });
    cut.takeRun(2048, 2048);
    cut.issued(3000, 1, 110);
    cut.completed(3000, 1, 120);
    cut.issued(5, 1, 130);
    cut.completed(5, 1, 140);
    cut.staged(2048, 2048, 190);
    cut.staged(0, 2048, 200);
    expect(cut.nextRun(4096, 3000)).toEqual({ block: 4096, count: 904 });
    cut.takeRun(4096, 904);
    // One that was not read after all is unknown again, and found wherever the search begins.
    cut.unreadRun(4096, 904);
    expect(cut.nextRun(0, 5000)).toEqual({ block: 4096, count: 904 });
    cut.takeRun(4096, 904);
    cut.staged(4096, 904, 210);
    expect(cut.nextRun(0, 5000)).toBeUndefined();
    expect(cut.unknownBlocks).toBe(0);
    cut.advance(300);
    expect(cut.decide()).toEqual({ kind: 'again', loNs: 130, hiNs: 120 });
    expect([...cut.take(130, 10)]).toEqual([3000]);
    cut.staged(3000, 1, 305);
    cut.advance(310);
    expect(cut.decide()).toEqual({ kind: 'holds', loNs: 130, hiNs: 140, instantNs: 140 });
  });

  it('wants blocks again whose commit failed', () => {
    const cut = new IntervalCut(10);
    cut.completed(3, 2, 50);
    cut.advance(100);
    for (const b of cut.take(100, 10)) cut.staged(b, 1, 90);
    expect(cut.claim()).toBe(100);
    cut.unread(3, 1);
    cut.advance(200);
    expect(cut.decide().kind).toBe('again');
    expect([...cut.take(0, 10)]).toEqual([3]);
  });

  it('counts completions that come after a point that should have had them', () => {
    const cut = new IntervalCut(10);
    cut.completed(1, 1, 50);
    cut.advance(100);
    for (const b of cut.take(100, 10)) cut.staged(b, 1, 90);
    cut.claim();
    cut.completed(2, 1, 100);
    expect(cut.lateCompletions).toBe(0);
    cut.completed(2, 1, 99);
    expect(cut.lateCompletions).toBe(1);
  });
});
