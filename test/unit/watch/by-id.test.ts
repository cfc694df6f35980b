import { mkdirSync, symlinkSync, writeFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { lastingName, lastingNameOf } from '../../../src/watch/by-id.js';
import { tempDir } from '../../support/tmp.js';

describe('lasting names of disks', () => {
  it('are found by the node and by what the disk says of itself', async () => {
    await using dir = tempDir();
    const byId = dir.join('by-id');
    mkdirSync(byId);
    for (const node of ['sda', 'sda1', 'sdb']) writeFileSync(dir.join(node), '');
    const link = (name: string, node: string): void => symlinkSync(`../${node}`, `${byId}/${name}`);
    link('ata-Disk_One_S3R1AL', 'sda');
    link('ata-Disk_One_S3R1AL-part1', 'sda1');
    link('wwn-0x5000c5001234', 'sdb');
    link('wwn-0xdead', 'gone');
    expect(await lastingName(dir.join('sda1'), byId)).toBe(`${byId}/ata-Disk_One_S3R1AL-part1`);
    expect(await lastingName(dir.join('sdx'), byId)).toBeUndefined();
    expect(await lastingNameOf({ serial: ' S3R1AL ' }, byId)).toEqual({
      link: `${byId}/ata-Disk_One_S3R1AL`,
      target: dir.join('sda'),
    });
    expect((await lastingNameOf({ wwn: '0x5000c5001234' }, byId))?.target).toBe(dir.join('sdb'));
    // Too short to tell anything, unknown, gone; no such directory at all.
    expect(await lastingNameOf({ serial: '1' }, byId)).toBeUndefined();
    expect(await lastingNameOf({ serial: 'OTHER' }, byId)).toBeUndefined();
    expect(await lastingNameOf({ wwn: '0xdead' }, byId)).toBeUndefined();
    expect(await lastingNameOf({ serial: 'S3R1AL' }, dir.join('none'))).toBeUndefined();
  });
});
