/** Pages built here record by record, damaged pages, and pages of random bytes. */
import { describe, expect, it } from 'vitest';
import { EventRole, PageParser, type BlockEvent } from '../../../../src/devices/trace/page.js';
import {
  blockEventLayout,
  parseEventFormat,
  parseHeaderPage,
} from '../../../../src/devices/trace/format.js';
import { parseCpuStats } from '../../../../src/devices/trace/instance.js';
import { seeded } from '../../../support/model-volume.js';

const COMMON = `format:
	field:unsigned short common_type;	offset:0;	size:2;	signed:0;
	field:unsigned char common_flags;	offset:2;	size:1;	signed:0;
	field:unsigned char common_preempt_count;	offset:3;	size:1;	signed:0;
	field:int common_pid;	offset:4;	size:4;	signed:1;

	field:dev_t dev;	offset:8;	size:4;	signed:0;
	field:sector_t sector;	offset:16;	size:8;	signed:0;
	field:unsigned int nr_sector;	offset:24;	size:4;	signed:0;
`;
/** Linux 6.18. */
const QUEUE = `name: block_bio_queue\nID: 2097\n${COMMON}	field:char rwbs[10];	offset:28;	size:10;	signed:0;
	field:char comm[16];	offset:38;	size:16;	signed:0;

print fmt: "%d,%d %s %llu + %u [%s]", ((unsigned int) ((REC->dev) >> 20)), REC->rwbs`;
/** Linux 6.1: rwbs is narrower and follows the error. */
const DONE = `name: block_rq_complete\nID: 1200\n${COMMON}	field:int error;	offset:28;	size:4;	signed:1;
	field:char rwbs[8];	offset:32;	size:8;	signed:0;
	field:__data_loc char[] cmd;	offset:40;	size:4;	signed:0;
`;
const HEADER = `	field: u64 timestamp;	offset:0;	size:8;	signed:0;
	field: local_t commit;	offset:8;	size:8;	signed:1;
	field: int overwrite;	offset:8;	size:1;	signed:1;
	field: char data;	offset:16;	size:4080;	signed:0;
`;

const queue = blockEventLayout(parseEventFormat(QUEUE, 'queue'), 'queue');
const done = blockEventLayout(parseEventFormat(DONE, 'done'), 'done');
const page = parseHeaderPage(HEADER, 'header');
const ORIGIN = 1_000_000_000_000n;

function parser(origin = ORIGIN): PageParser {
  return new PageParser(
    page,
    [
      { role: EventRole.issue, layout: queue },
      { role: EventRole.requestDone, layout: done },
    ],
    origin,
  );
}

/** Builds one page. */
class Page {
  private readonly bytes = Buffer.alloc(4096);
  private at = 16;

  constructor(timeNs: bigint) {
    this.bytes.writeBigUInt64LE(timeNs, 0);
  }

  word(type: number, delta: number, more?: number): this {
    this.bytes.writeUInt32LE(((delta << 5) | type) >>> 0, this.at);
    this.at += 4;
    if (more !== undefined) {
      this.bytes.writeUInt32LE(more >>> 0, this.at);
      this.at += 4;
    }
    return this;
  }

  event(
    id: number,
    delta: number,
    sector: number,
    sectors: number,
    rwbs: string,
    form: 'short' | 'long' = 'short',
  ): this {
    const layout = id === queue.id ? queue : done;
    const body = Buffer.alloc(56);
    body.writeUInt16LE(id, 0);
    body.writeUInt32LE(0x0070_0001, layout.devAt);
    body.writeBigUInt64LE(BigInt(sector), layout.sectorAt);
    body.writeUInt32LE(sectors, layout.sectorsAt);
    body.write(rwbs, layout.rwbsAt, 'latin1');
    if (form === 'short') this.word(body.length / 4, delta);
    else this.word(0, delta, body.length + 4);
    body.copy(this.bytes, this.at);
    this.at += body.length;
    return this;
  }

  view(flags = 0, missed?: number): DataView {
    this.bytes.writeUInt32LE(((this.at - 16) | flags) >>> 0, 8);
    if (missed !== undefined) this.bytes.writeBigUInt64LE(BigInt(missed), this.at);
    return new DataView(this.bytes.buffer, this.bytes.byteOffset, this.bytes.length);
  }
}

function read(
  view: DataView,
  p = parser(),
): { events: BlockEvent[]; missed: number; damage: string | undefined } {
  const events: BlockEvent[] = [];
  const { missed, damage } = p.parse(view, (e) => events.push({ ...e }));
  return { events, missed, damage };
}

describe('formats', () => {
  it('reads offsets from the kernel’s own description', () => {
    expect(queue).toEqual({
      id: 2097,
      devAt: 8,
      sectorAt: 16,
      sectorsAt: 24,
      rwbsAt: 28,
      rwbsBytes: 10,
      minBytes: 38,
    });
    expect(done).toMatchObject({ id: 1200, rwbsAt: 32, rwbsBytes: 8, minBytes: 40 });
    expect(page).toEqual({ commitAt: 8, dataAt: 16, pageBytes: 4096 });
  });

  it.each([
    ['no ID', QUEUE.replace('ID: 2097', ''), 'no usable ID'],
    ['no sector', QUEUE.replace('sector_t sector', 'sector_t place'), 'there is no field sector'],
    [
      'a short sector',
      QUEUE.replace('offset:16;	size:8', 'offset:16;	size:4'),
      'field sector has 4 bytes',
    ],
    [
      'another start',
      QUEUE.replace('common_type;	offset:0', 'common_type;	offset:2'),
      'common_type is not at the start',
    ],
  ])('refuses %s', (_name, text, message) => {
    expect(() => blockEventLayout(parseEventFormat(text, '/x/format'), '/x/format')).toThrow(
      message,
    );
  });

  it('refuses a page it does not know', () => {
    expect(() => parseHeaderPage(HEADER.replace('offset:16', 'offset:24'), 'h')).toThrow(
      'do not follow',
    );
    expect(() => parseHeaderPage('', 'h')).toThrow('does not start with a time');
  });

  it('reads the counters of a buffer', () => {
    expect(
      parseCpuStats('entries: 180\noverrun: 3\ncommit overrun: 4\nbytes: 1\ndropped events: 5\n'),
    ).toEqual({ overrun: 3, dropped: 9 });
  });
});

describe('pages', () => {
  it('gives events with their times: deltas, extensions, padding and absolute times', () => {
    const view = new Page(ORIGIN + 500n)
      .event(queue.id, 7, 2 ** 33 + 8, 8, 'WS')
      .word(30, 5, 3)
      .event(done.id, 2, 16, 24, 'FWFS', 'long')
      .word(29, 11, 12)
      .word(0, 0)
      .word(0, 0)
      .event(queue.id, 1, 0, 1, 'DS')
      .word(
        31,
        Number((ORIGIN + 700_000_000n) & 0x7ff_ffffn),
        Number(((ORIGIN + 700_000_000n) >> 27n) & 0xffff_ffffn),
      )
      .event(queue.id, 4, 0, 1, 'N')
      .event(queue.id, 0, 0, 1, 'WZS')
      .event(queue.id, 0, 0, 1, 'RA')
      .event(999, 0, 0, 1, 'W')
      .word(29, 0)
      .view();
    const second = 500 + 7 + 5 + 3 * 2 ** 27 + 2;
    const { events, missed, damage } = read(view);
    expect({ missed, damage }).toEqual({ missed: 0, damage: undefined });
    const dev = 0x0070_0001;
    expect(events).toEqual([
      {
        role: EventRole.issue,
        dev,
        sector: 2 ** 33 + 8,
        sectors: 8,
        kind: 'write',
        isFlush: false,
        isRead: false,
        atNs: 507,
      },
      {
        role: EventRole.requestDone,
        dev,
        sector: 16,
        sectors: 24,
        kind: 'write',
        isFlush: true,
        isRead: false,
        atNs: second,
      },
      {
        role: EventRole.issue,
        dev,
        sector: 0,
        sectors: 1,
        kind: 'discard',
        isFlush: false,
        isRead: false,
        atNs: second + 12,
      },
      {
        role: EventRole.issue,
        dev,
        sector: 0,
        sectors: 1,
        kind: 'zeroes',
        isFlush: false,
        isRead: false,
        atNs: 700_000_004,
      },
      {
        role: EventRole.issue,
        dev,
        sector: 0,
        sectors: 1,
        kind: 'zeroes',
        isFlush: false,
        isRead: false,
        atNs: 700_000_004,
      },
      {
        role: EventRole.issue,
        dev,
        sector: 0,
        sectors: 1,
        kind: 'write',
        isFlush: false,
        isRead: true,
        atNs: 700_000_004,
      },
    ]);
  });

  it('keeps nanoseconds exact after years of uptime', () => {
    const origin = 400n * 86_400n * 1_000_000_000n;
    const view = new Page(origin + 1n)
      .event(queue.id, 1, 0, 8, 'W')
      .event(queue.id, 1, 0, 8, 'W')
      .view();
    expect(read(view, parser(origin)).events.map((e) => e.atNs)).toEqual([2, 3]);
  });

  it('tells lost records, with their number where it is there', () => {
    const one = (): Page => new Page(ORIGIN).event(queue.id, 1, 0, 8, 'W');
    expect(read(one().view(0x8000_0000))).toMatchObject({ missed: -1, damage: undefined });
    expect(read(one().view(0xc000_0000, 1234))).toMatchObject({ missed: 1234 });
    expect(read(one().view(0xc000_0000, 1234)).events).toHaveLength(1);
  });

  it.each([
    ['a length beyond the page', (p: Page) => p.view(0xf_f000), 'bytes of records in a page'],
    ['a record that is cut off', (p: Page) => p.word(20, 1).view(), 'is cut off'],
    ['a record without length', (p: Page) => p.word(0, 1, 2).view(), 'a record of 2 bytes'],
    ['padding over the end', (p: Page) => p.word(29, 1, 4000).view(), 'padding of 4000 bytes'],
    [
      'a block event too short for its fields',
      (p: Page) => p.word(1, 1, 2097).view(),
      'a short record',
    ],
  ])('tells %s', (_name, make, message) => {
    expect(read(make(new Page(ORIGIN).event(queue.id, 1, 0, 8, 'W'))).damage).toContain(message);
  });

  it('survives random bytes and flipped bits: never throws, never reads outside the page', () => {
    const random = seeded(7);
    const p = parser();
    for (let i = 0; i < 20_000; i++) {
      let bytes: Buffer;
      if (i % 2 === 0) {
        bytes = Buffer.alloc(1 + Math.floor(random() * 600));
        for (let k = 0; k < bytes.length; k++) bytes[k] = Math.floor(random() * 256);
        // A plausible length, so that the records are looked at.
        if (bytes.length > 24)
          bytes.writeUInt32LE((bytes.length - 16 - Math.floor(random() * 8)) >>> 0, 8);
      } else {
        const built = new Page(ORIGIN);
        for (let k = 0; k < 5; k++)
          built.event(queue.id, k, k * 8, 8, 'WS', k % 2 === 0 ? 'long' : 'short');
        const view = built.view();
        bytes = Buffer.from(view.buffer, view.byteOffset, 512);
        for (let k = 0; k < 4; k++) {
          const at = Math.floor(random() * 400);
          bytes[at] = (bytes[at] ?? 0) ^ (1 << Math.floor(random() * 8));
        }
      }
      let events = 0;
      const r = p.parse(new DataView(bytes.buffer, bytes.byteOffset, bytes.length), () => events++);
      expect(r.events).toBe(events);
      expect(events).toBeLessThan(200);
    }
  });
});
